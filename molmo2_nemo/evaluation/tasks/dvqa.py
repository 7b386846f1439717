"""DVQA (arXiv 1801.08163): questions about bar charts; the easy validation split.

Data: files of the data set, fetched by hand: `molmo2 prepare dv_qa --split validation`.
Score: plain_match; the released evaluation has no figure of it.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class DvQa(ShardTask):
    name = "dvqa"
    title = "questions about bar charts (DVQA, easy validation)"
    group = "image QA"
    scorers = ("plain_match", "relaxed_accuracy")
    max_new_tokens = 32
    folder = "dv_qa-validation"
    prepare = "molmo2 prepare dv_qa --split validation"


TASK = DvQa()
