"""ChartQA (arXiv 2203.10244): short answers about charts; the validation split, human and augmented questions.

Data: the Hub's HuggingFaceM4/ChartQA: `molmo2 prepare chart_qa_weighted --split validation`.
Score: relaxed_accuracy, as published; beside it the two others that the released evaluation computes.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class ChartQa(ShardTask):
    name = "chartqa"
    title = "questions about charts (ChartQA, validation)"
    group = "image QA"
    scorers = ("relaxed_accuracy", "scifi_accuracy", "plain_match")
    max_new_tokens = 32
    folder = "chart_qa_weighted-validation"
    prepare = "molmo2 prepare chart_qa_weighted --split validation"


TASK = ChartQa()
