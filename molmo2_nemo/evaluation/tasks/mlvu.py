"""MLVU (arXiv 2406.04264), the multiple choice of its dev split: seven kinds of question about videos of up to two
hours.

Data: json/1_plotQA.json to json/7_topic_reasoning.json of the Hub's MLVU/MVLU (a licence is to be accepted) and the
videos beside them as video/<file's name>/<video>, in MLVU/ in the folder of data sets. Fields read: video, question,
candidates, answer (one of them), duration. Score: option_start, as published; by kind of question. Its open questions
(sub-scene captions and summaries) need a judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.evaluation.choice import LETTERS
from molmo2_nemo.evaluation.video_choice import LETTER_ONLY, Row, VideoChoice, VideoChoiceTask, listed, table_rows

KINDS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")


class Mlvu(VideoChoiceTask):
    name = "mlvu"
    title = "multiple choice about long videos (MLVU, dev)"
    group = "long video QA"
    scorers = ("option_start",)
    places = ("MLVU", "MVLU/MLVU", "video_datasets/MVLU/MLVU")
    table = "json/1_plotQA.json"
    fetch = "put there MLVU/json/ of https://huggingface.co/datasets/MLVU/MVLU, and beside it its videos as video/"

    def rows(self, folder: Path) -> Iterator[tuple[str, Row]]:
        """The questions of all seven files."""
        for number, kind in enumerate(KINDS, start=1):
            name = f"{number}_{kind}"
            for where, row in table_rows(folder / "json" / f"{name}.json"):
                yield where, {**row, "file": name}

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        options = list(row["candidates"])
        asked = "\n".join([row["question"], listed(options), LETTER_ONLY])
        video = folder / "video" / row["file"] / row["video"]
        letter, tags = LETTERS[options.index(row["answer"])], {"type": row["file"].split("_", 1)[1]}
        return [VideoChoice(f"{key}_{row['video']}", video, asked, options, letter, tags)]


TASK = Mlvu()
