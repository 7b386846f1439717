"""DocVQA (arXiv 2007.00398): short answers about scanned documents; the validation split.

Data: files of the competition (rrc.cvc.uab.es, task 1), fetched by hand: `molmo2 prepare doc_qa --split validation`.
Score: anls, as published; beside it exact match but for case.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class DocVqa(ShardTask):
    name = "docvqa"
    title = "questions about documents (DocVQA, validation)"
    group = "image QA"
    scorers = ("anls", "plain_match")
    max_new_tokens = 32
    folder = "doc_qa-validation"
    prepare = "molmo2 prepare doc_qa --split validation"


TASK = DocVqa()
