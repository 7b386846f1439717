"""Perception Test (arXiv 2305.13786), multiple choice of three about short videos: the validation split.

Data: mc_question_val/validation-00000-of-00001.parquet of the Hub's lmms-lab/PerceptionTest_Val and its videos,
unpacked as videos/<video_name>.mp4, together in PerceptionTest/ in the folder of data sets. Columns read: video_name,
question, options, answer_id, area. Score: perception_test, as published; by area. (The paper's column is the test
split, whose answers are not public.)
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.evaluation.video_choice import LETTER_ONLY, Row, VideoChoice, VideoChoiceTask, listed


class PerceptionTest(VideoChoiceTask):
    name = "perception_test"
    title = "multiple choice about short videos (Perception Test, validation)"
    group = "short video QA"
    scorers = ("perception_test",)
    places = ("PerceptionTest", "video_datasets/perception_test")
    table = "mc_question_val/validation-00000-of-00001.parquet"
    fetch = (
        "put there mc_question_val/ of https://huggingface.co/datasets/lmms-lab/PerceptionTest_Val, and beside it "
        "its videos unpacked as videos/"
    )

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        options = list(row["options"])
        asked = "\n".join([row["question"], listed(options), LETTER_ONLY])
        video = folder / "videos" / f"{row['video_name']}.mp4"
        letter, tags = "ABC"[int(row["answer_id"])], {"area": str(row["area"])}
        return [VideoChoice(f"{key}_{row['video_name']}", video, asked, options, letter, tags)]


TASK = PerceptionTest()
