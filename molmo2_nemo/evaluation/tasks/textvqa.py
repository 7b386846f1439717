"""TextVQA (arXiv 1904.08920): questions about text in pictures, ten answers each; the validation split.

Data: the Hub's questions, images from their site by hand: `molmo2 prepare text_vqa --split validation`.
Score: vqa_accuracy, as published.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class TextVqa(ShardTask):
    name = "textvqa"
    title = "questions about text in pictures (TextVQA, validation)"
    group = "image QA"
    scorers = ("vqa_accuracy",)
    max_new_tokens = 32
    folder = "text_vqa-validation"
    prepare = "molmo2 prepare text_vqa --split validation"


TASK = TextVqa()
