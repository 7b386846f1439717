"""OK-VQA (arXiv 1906.00067): questions that need outside knowledge, ten answers each; the validation split.

Data: the Hub's questions, COCO's images of 2014 by hand: `molmo2 prepare okvqa --split validation`.
Score: vqa_accuracy, as published.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class OkVqa(ShardTask):
    name = "okvqa"
    title = "questions that need knowledge (OK-VQA, validation)"
    group = "image QA"
    scorers = ("vqa_accuracy",)
    max_new_tokens = 32
    folder = "okvqa-validation"
    prepare = "molmo2 prepare okvqa --split validation"


TASK = OkVqa()
