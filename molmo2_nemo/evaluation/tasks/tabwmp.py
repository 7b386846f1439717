"""TabMWP (arXiv 2209.14610): sums about tables, answered directly; the dev split.

Data: files of the data set, fetched by hand: `molmo2 prepare tabwmp_da --split validation`.
Score: plain_match; the released evaluation has no figure of it.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class TabMwp(ShardTask):
    name = "tabwmp"
    title = "sums about tables (TabMWP, dev)"
    group = "image QA"
    scorers = ("plain_match", "relaxed_accuracy")
    max_new_tokens = 32
    folder = "tabwmp_da-validation"
    prepare = "molmo2 prepare tabwmp_da --split validation"


TASK = TabMwp()
