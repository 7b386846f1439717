"""ST-VQA (arXiv 1905.13648): short answers about text in scenes; 1,024 questions held out as released.

Data: files of the competition (rrc.cvc.uab.es), fetched by hand: `molmo2 prepare st_qa --split validation`.
Score: anls, as published; beside it exact match but for case.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class SceneTextVqa(ShardTask):
    name = "stvqa"
    title = "questions about text in scenes (ST-VQA, held out)"
    group = "image QA"
    scorers = ("anls", "plain_match")
    max_new_tokens = 32
    folder = "st_qa-validation"
    prepare = "molmo2 prepare st_qa --split validation"


TASK = SceneTextVqa()
