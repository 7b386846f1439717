"""LongBench v2 (arXiv 2412.15204), the short part: multiple choice of four about texts of up to 32,000 words, 180
questions; a guard of what the language model could read before it was trained on video.

Data: THUDM/LongBench-v2 of huggingface.co (now zai-org/LongBench-v2) in LongBench-v2/: data.json. Fields read: domain,
difficulty, length, question, choice_A to choice_D, answer (a letter), context.
Asked without reasoning: the text, the question in the layout of evaluation. Nothing is cut: the longer parts (`medium`,
`long`, up to 2 million words), whose middle the benchmark's own code cuts out, are not asked, and a prompt beyond the
positions of the model's rotary tables is said below the figures. Score: multiple_choice; by domain and difficulty.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.data.multiple_choice import standard_choice
from molmo2_nemo.evaluation.choice import choice_reference, place_of
from molmo2_nemo.evaluation.hub_tables import HubTask, Row
from molmo2_nemo.evaluation.task import Question
from molmo2_nemo.inference.prompt import Prompt

LENGTH = "short"


class LongBenchV2(HubTask):
    name = "longbench_v2"
    title = "multiple choice about long texts (LongBench v2, short: to 32,000 words)"
    group = "text"
    scorers = ("multiple_choice",)
    dataset = "THUDM/LongBench-v2"
    tables = "data.json"
    selects = True
    columns = ("domain", "difficulty", "length", "question", "answer", "context")

    def kept(self, row: Row) -> bool:
        return not isinstance(row, dict) or row.get("length", LENGTH) == LENGTH

    def question(self, row: Row, key: str, folder: Path) -> Question:
        options = [row[f"choice_{letter}"] for letter in "ABCD"]
        asked, _ = standard_choice(row["question"], options, None)
        text = f"Please read the following text and answer the question below.\n\n{row['context']}\n\n{asked}"
        tags = {"domain": row["domain"], "difficulty": row["difficulty"]}
        return Question(key, Prompt(text), (choice_reference(place_of(row["answer"]), options),), tags=tags)


TASK = LongBenchV2()
