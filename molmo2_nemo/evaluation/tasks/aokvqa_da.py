"""A-OKVQA (arXiv 2206.01718), direct answers: questions that need knowledge; the validation split.

Data: the Hub's questions, COCO's images of 2017 by hand: `molmo2 prepare a_okvqa_da --split validation`.
Score: aokvqa_accuracy, as published.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class AokVqaDirect(ShardTask):
    name = "aokvqa_da"
    title = "questions that need knowledge, short answers (A-OKVQA, validation)"
    group = "image QA"
    scorers = ("aokvqa_accuracy",)
    max_new_tokens = 32
    folder = "a_okvqa_da-validation"
    prepare = "molmo2 prepare a_okvqa_da --split validation"


TASK = AokVqaDirect()
