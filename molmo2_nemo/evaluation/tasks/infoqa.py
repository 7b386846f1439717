"""InfographicVQA (arXiv 2104.12756): short answers about infographics; the validation split.

Data: files of the competition (rrc.cvc.uab.es, task 3), fetched by hand: `molmo2 prepare info_qa --split validation`.
Score: anls, as published; beside it exact match but for case.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class InfoQa(ShardTask):
    name = "infoqa"
    title = "questions about infographics (InfographicVQA, validation)"
    group = "image QA"
    scorers = ("anls", "plain_match")
    max_new_tokens = 32
    folder = "info_qa-validation"
    prepare = "molmo2 prepare info_qa --split validation"


TASK = InfoQa()
