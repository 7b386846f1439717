"""MotionBench (arXiv 2501.02955), multiple choice about fine motion in short videos: the dev questions.

Data: MotionBench/video_info.meta.jsonl of the Hub's zai-org/MotionBench, its videos beside it in self-collected/ and
public-dataset/, together in MotionBench/ in the folder of data sets. Fields read: video_path, question_type, qa (uid,
question with its options, answer: a letter; NA in the test split, which is left out). Score: option_start, as
published; by type of question.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.evaluation.choice import options_in
from molmo2_nemo.evaluation.video_choice import Row, VideoChoice, VideoChoiceTask


class MotionBench(VideoChoiceTask):
    name = "motionbench"
    title = "multiple choice about fine motion (MotionBench, dev)"
    group = "short video QA"
    scorers = ("option_start",)
    places = ("MotionBench", "MotionBench/MotionBench", "video_datasets/MotionBench/MotionBench")
    table = "video_info.meta.jsonl"
    fetch = (
        "put there MotionBench/ of https://huggingface.co/datasets/zai-org/MotionBench: the table, self-collected/ and "
        "public-dataset/"
    )

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        own, public = (folder / kind / row["video_path"] for kind in ("self-collected", "public-dataset"))
        video = own if own.is_file() else public
        tags = {"type": str(row.get("question_type", ""))}
        asked = [entry for entry in row["qa"] if entry["answer"] != "NA"]
        return [
            VideoChoice(f"{key}_{qa['uid']}", video, qa["question"], options_in(qa["question"]), qa["answer"], tags)
            for qa in asked
        ]


TASK = MotionBench()
