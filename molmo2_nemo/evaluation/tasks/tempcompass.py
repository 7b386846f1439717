"""TempCompass (arXiv 2403.00476): multiple choice, yes or no, and caption matching about short, conflicting videos.

Data: <kind>/test-00000-of-00001.parquet of the Hub's lmms-lab/TempCompass for the kinds multi-choice, yes_no and
caption_matching, and tempcompass_videos.zip unpacked as videos/<video_id>.mp4, together in TempCompass/ in the folder
of data sets. Columns read: video_id, question (with its options), answer, dim.
The released code has an evaluator for it and no loader; questions end as in the benchmark's own repository. Score:
tempcompass, the released one without its judge; by kind and aspect. Its fourth kind, captions, needs a judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.evaluation.video_choice import Row, VideoChoice, VideoChoiceTask, table_rows

OPTION, YES_NO = "Please directly give the best option:", "Please answer yes or no:"
KINDS = {  # what a question ends with, and its style
    "multi-choice": (OPTION, "video_multiple_choice"),
    "yes_no": (YES_NO, "video_short_answer"),
    "caption_matching": (OPTION, "video_multiple_choice"),
}
FILE = "test-00000-of-00001.parquet"


class TempCompass(VideoChoiceTask):
    name = "tempcompass"
    title = "temporal perception: choice, yes or no, caption matching (TempCompass)"
    group = "short video QA"
    scorers = ("tempcompass",)
    places = ("TempCompass", "video_datasets/TempCompass")
    table = f"multi-choice/{FILE}"
    fetch = (
        "put there multi-choice/, yes_no/ and caption_matching/ of "
        "https://huggingface.co/datasets/lmms-lab/TempCompass, and beside them its videos unpacked as videos/"
    )

    def rows(self, folder: Path) -> Iterator[tuple[str, Row]]:
        """The questions of the three kinds."""
        for kind in KINDS:
            for where, row in table_rows(folder / kind / FILE):
                yield where, {**row, "kind": kind}

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        end, style = KINDS[row["kind"]]
        reference = {"task": row["kind"], "answer": row["answer"], "aspect": row["dim"]}
        return [
            VideoChoice(
                f"{key}_{row['video_id']}",
                folder / "videos" / f"{row['video_id']}.mp4",
                f"{row['question']}\n{end}",
                (),
                "",
                {"kind": row["kind"], "aspect": row["dim"]},
                style=style,
                reference=reference,
            )
        ]


TASK = TempCompass()
