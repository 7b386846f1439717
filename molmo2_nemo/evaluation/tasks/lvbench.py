"""LVBench (arXiv 2406.08035), multiple choice of four about videos of half an hour and more: 1,549 questions.

Data: video_info.meta.jsonl of the Hub's zai-org/LVBench, and the videos (of YouTube, by hand) beside it as <key>.mp4,
in LVBench/ in the folder of data sets. Fields read: key, qa (uid, question with its options as lines, answer: a
letter, question_type: a list). Score: option_start, as published but for responses with "Answer:"; by type of
question, where a question of several types counts in each.
"""

from __future__ import annotations

import re
from pathlib import Path

from molmo2_nemo.errors import DataError
from molmo2_nemo.evaluation.video_choice import Row, VideoChoice, VideoChoiceTask, listed

INSTRUCTION = "Please respond with only the letter of the correct answer."
LABEL = re.compile(r"\(?([A-Z])[.)]+\s*")  # of an option: (A), A), A.


def divided(text: str) -> tuple[str, list[str]]:
    """The question in a text, its first line, and the options in the others, without their letters.

    Raises:
        DataError: the letters are not A, B, C, ...
    """
    question, *lines = [line.strip() for line in text.splitlines() if line.strip()]
    labels = [LABEL.match(line) for line in lines]
    if [label and label[1] for label in labels] != list("ABCDEFGHIJ"[: len(lines)]):
        raise DataError(f"options are {lines}, expected (A), (B), ...")
    return question, [line[label.end() :] for line, label in zip(lines, labels, strict=True) if label]


class LvBench(VideoChoiceTask):
    name = "lvbench"
    title = "multiple choice about very long videos (LVBench)"
    group = "long video QA"
    scorers = ("option_start",)
    places = ("LVBench", "video_datasets/LVBench")
    table = "video_info.meta.jsonl"
    fetch = (
        "put there the table of https://huggingface.co/datasets/zai-org/LVBench, and beside it the videos as <key>.mp4"
    )

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        video = folder / f"{row['key']}.mp4"
        found = []
        for qa in row["qa"]:
            question, options = divided(qa["question"])
            asked = "\n".join([question, listed(options), INSTRUCTION])
            tags = {kind: "yes" for kind in qa["question_type"]}
            found.append(VideoChoice(f"{key}_{qa['uid']}", video, asked, options, qa["answer"], tags))
        return found


TASK = LvBench()
