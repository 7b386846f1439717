"""VSI-Bench (arXiv 2412.14171): where things are in rooms, from videos of them; multiple choice and numbers, 5,130
questions.

Data: test.jsonl of the Hub's nyu-visionx/VSI-Bench and its archives unpacked beside it as <dataset>/<scene_name>.mp4,
together in VSI-Bench/ in the folder of data sets. Fields read: id, dataset, scene_name, question_type, question,
options (with letters; null where a number is asked for), ground_truth.
The released code has an evaluator for it and no loader; the question is put as in the benchmark's own code. Score:
vsi_bench (mean over kinds of question, numbers by mean relative accuracy), as released; 16 tokens, as released.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.evaluation.video_choice import LETTER_ONLY, Row, VideoChoice, VideoChoiceTask

FIRST, NUMBER = "These are frames of a video.", "Please answer the question using a single word or phrase."


class VsiBench(VideoChoiceTask):
    name = "vsi_bench"
    title = "space, sizes and distances in videos of rooms (VSI-Bench)"
    group = "short video QA"
    scorers = ("vsi_bench",)
    max_new_tokens = 16
    places = ("VSI-Bench", "video_datasets/VSI-Bench")
    table = "test.jsonl"
    fetch = "put there the files of https://huggingface.co/datasets/nyu-visionx/VSI-Bench, its archives unpacked"

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        options, kind, answer = list(row.get("options") or ()), row["question_type"], str(row["ground_truth"])
        end = ["Options:", *options, LETTER_ONLY] if options else [NUMBER]
        return [
            VideoChoice(
                f"{key}_{row['id']}",
                folder / row["dataset"] / f"{row['scene_name']}.mp4",
                "\n".join([FIRST, row["question"], *end]),
                options,
                answer if options else "",
                {"kind": kind},
                style="video_multiple_choice" if options else "video_short_answer",
                reference={"kind": kind} if options else {"kind": kind, "number": float(answer)},
            )
        ]


TASK = VsiBench()
