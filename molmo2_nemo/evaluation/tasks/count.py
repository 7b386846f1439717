"""PixMo-Count (arXiv 2409.17146): how many things of a name are in an image, answered by pointing at each.

Data: the published validation split, images from their sites: `molmo2 prepare pixmo_count_train --split validation`.
Score: point_count, as published: as many points as there are things. Beside it `pointing`, whether the points are where
the annotators' are (no masks: near them).
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class Count(ShardTask):
    name = "count"
    title = "how many things of a name are in an image (PixMo-Count)"
    group = "point"
    scorers = ("point_count", "pointing")
    max_new_tokens = 512
    folder = "pixmo_count_train-validation"
    prepare = "molmo2 prepare pixmo_count_train --split validation"


TASK = Count()
