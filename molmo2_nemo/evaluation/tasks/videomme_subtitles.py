"""Video-MME (arXiv 2405.21075) with subtitles; see tasks/videomme.py.

Data: further, subtitles.json of the Hub's allenai/Molmo2-VideoMME beside the other files: by videoID, lines with start,
end (seconds) and text. A video that has none is shown without. Score: videomme, as published; by duration.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.errors import UserError, read_text
from molmo2_nemo.evaluation.tasks.videomme import VideoMme
from molmo2_nemo.evaluation.video_choice import Row, read_json

FILE = "subtitles.json"


class VideoMmeSubtitles(VideoMme):
    name = "videomme_subtitles"
    title = "multiple choice about videos of all lengths, with subtitles (Video-MME)"

    def rows(self, folder: Path) -> Iterator[tuple[str, Row]]:
        """The rows of the table with the lines of their videos.

        Raises:
            UserError: no file of subtitles, or not one.
        """
        path = folder / FILE
        if not path.is_file():
            raise UserError(
                f"task {self.name}: no {path}; put there {FILE} of https://huggingface.co/datasets/allenai/Molmo2-VideoMME"
            )
        known = read_json(read_text(path), str(path))
        for where, row in super().rows(folder):
            lines = known.get(row["videoID"], {}).values()
            yield where, {**row, "lines": [(float(line["start"]), float(line["end"]), line["text"]) for line in lines]}


TASK = VideoMmeSubtitles()
