"""VQA v2 (arXiv 1612.00837): questions about photographs, ten answers each; the validation split.

Data: the Hub's questions, COCO's images of 2014 by hand: `molmo2 prepare coco_2014_vqa_multi --split validation`.
Score: vqa_accuracy, as published. The paper's column is test-standard, whose answers are not public.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class Vqa2(ShardTask):
    name = "vqa2"
    title = "questions about photographs (VQA v2, validation)"
    group = "image QA"
    scorers = ("vqa_accuracy",)
    max_new_tokens = 32
    folder = "coco_2014_vqa_multi-validation"
    prepare = "molmo2 prepare coco_2014_vqa_multi --split validation"


TASK = Vqa2()
