"""NExT-QA (arXiv 2105.08276), multiple choice of five about short videos: the test split.

Data: MC/test-00000-of-00001.parquet of the Hub's lmms-lab/NExTQA and its videos, unpacked as NExTVideo/<video>.mp4,
together in NeXTQA/ in the folder of data sets. Columns read: video, question, a0 to a4, answer (0 to 4), type.
Score: nextqa, as published; by type of question.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.evaluation.video_choice import LETTER_ONLY, Row, VideoChoice, VideoChoiceTask, listed


class NextQa(VideoChoiceTask):
    name = "nextqa"
    title = "multiple choice about short videos (NExT-QA, test)"
    group = "short video QA"
    scorers = ("nextqa",)
    places = ("NeXTQA", "video_datasets/NeXTQA")
    table = "MC/test-00000-of-00001.parquet"
    fetch = (
        "put there MC/ of https://huggingface.co/datasets/lmms-lab/NExTQA, and beside it its videos unpacked as "
        "NExTVideo/"
    )

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        options = [row[f"a{number}"].strip() for number in range(5)]
        asked = "\n".join([row["question"].strip(), listed(options), LETTER_ONLY])
        video = folder / "NExTVideo" / f"{row['video']}.mp4"
        return [
            VideoChoice(
                f"{key}_{row['video']}", video, asked, options, "ABCDE"[int(row["answer"])], {"type": row["type"]}
            )
        ]


TASK = NextQa()
