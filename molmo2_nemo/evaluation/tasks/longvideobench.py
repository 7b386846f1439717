"""LongVideoBench (arXiv 2407.15754), multiple choice about videos of 8 seconds to an hour: the validation split.

Data: lvb_val.json of the Hub's longvideobench/LongVideoBench (a licence is to be accepted), and videos/ and subtitles/
unpacked beside it, in LongVideoBench/ in the folder of data sets. Fields read: id, video_path, question, candidates,
correct_choice (from 0), duration_group, question_category. Subtitles are not shown (longvideobench_subtitles shows
them), though some questions name them. Score: longvideobench, as published; by duration_group (15, 60, 600 or 3600
seconds) and category.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from molmo2_nemo.data.subtitle_files import Line
from molmo2_nemo.evaluation.choice import LETTERS
from molmo2_nemo.evaluation.video_choice import LETTER_ONLY, Row, VideoChoice, VideoChoiceTask, listed


class LongVideoBench(VideoChoiceTask):
    name = "longvideobench"
    title = "multiple choice about long videos (LongVideoBench, validation)"
    group = "long video QA"
    scorers = ("longvideobench",)
    places = ("LongVideoBench", "video_datasets/LongVideoBench")
    table = "lvb_val.json"
    fetch = (
        "put there lvb_val.json, videos/ and subtitles/ of "
        "https://huggingface.co/datasets/longvideobench/LongVideoBench"
    )

    def subtitles(self, folder: Path, row: Row) -> Sequence[Line]:
        """The lines of a question's video that are shown."""
        return ()

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        options = list(row["candidates"])
        asked = "\n".join([row["question"], listed(options), LETTER_ONLY])
        video = folder / "videos" / row["video_path"]
        tags = {"duration": str(row["duration_group"]), "category": row["question_category"]}
        letter, lines = LETTERS[row["correct_choice"]], self.subtitles(folder, row)
        return [VideoChoice(f"{key}_{row['id']}", video, asked, options, letter, tags, lines)]


TASK = LongVideoBench()
