"""RealWorldQA (x.ai, 2024): 765 questions on pictures from cars and daily life, multiple choice and short answers.

Data: xai-org/RealworldQA of huggingface.co in RealworldQA/: data/test-*.parquet. Columns read: image, question, answer.
Asked as the released loader asks by default: multiple choice with the instruction that the question ends with, short
answers without theirs, in the style `eval_short_answer` (vqa2). Score: realworldqa, as released.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.evaluation.choice import choice_reference, options_in, place_of
from molmo2_nemo.evaluation.hub_tables import HubTask, Row, picture
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt

SHORT_ANSWER = "Please answer directly with a single word or number."


class RealWorldQa(HubTask):
    name = "realworldqa"
    title = "questions on pictures of the real world (RealWorldQA)"
    group = "image QA"
    scorers = ("realworldqa",)
    dataset = "xai-org/RealworldQA"
    tables = "data/test-*.parquet"
    columns = ("image", "question", "answer")

    def question(self, row: Row, key: str, folder: Path) -> Question:
        asked, answer, shown = row["question"], row["answer"], [picture(row["image"])]
        if SHORT_ANSWER in asked:
            prompt = Prompt(asked.split("\n")[0], shown, style="eval_short_answer")
            return Question(key, prompt, (answer,), tags={"type": "short answer"})
        reference = choice_reference(place_of(answer), options_in(asked))
        prompt = Prompt(asked, shown, style="eval_multiple_choice")
        return Question(key, prompt, (reference,), tags={"type": "multiple choice"})


TASK = RealWorldQa()
