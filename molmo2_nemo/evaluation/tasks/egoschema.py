"""EgoSchema (arXiv 2308.09126), multiple choice of five about three minutes of first-person video: the public subset.

Data: Subset/test-00000-of-00001.parquet of the Hub's lmms-lab/egoschema (500 questions with answers) and its videos,
unpacked as videos/<video_idx>.mp4, together in EgoSchema/ in the folder of data sets. Columns read: video_idx,
question_idx, question, option (with letters), answer (0 to 4). Score: egoschema, as published. (The paper's column is
the full test, whose answers are not public.)
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.evaluation.video_choice import LETTER_ONLY, Row, VideoChoice, VideoChoiceTask


class EgoSchema(VideoChoiceTask):
    name = "egoschema"
    title = "multiple choice about first-person video (EgoSchema, public subset)"
    group = "long video QA"
    scorers = ("egoschema",)
    places = ("EgoSchema", "video_datasets/egoschema")
    table = "Subset/test-00000-of-00001.parquet"
    fetch = (
        "put there Subset/ of https://huggingface.co/datasets/lmms-lab/egoschema, and beside it its videos unpacked as "
        "videos/"
    )

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        options = list(row["option"])
        asked = "\n".join([row["question"], *options, LETTER_ONLY])
        video = folder / "videos" / f"{row['video_idx']}.mp4"
        return [VideoChoice(f"{key}_{row['question_idx']}", video, asked, options, "ABCDE"[int(row["answer"])])]


TASK = EgoSchema()
