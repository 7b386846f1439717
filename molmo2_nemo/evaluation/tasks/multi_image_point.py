"""Molmo2-MultiImagePoint: point at everything of a name in several images.

Data: the published validation split: `molmo2 prepare pixmo_multi_points --split validation`.
Score: pointing, without masks and within each image. The released code has no figure for it.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class MultiImagePoint(ShardTask):
    name = "multi_image_point"
    title = "point at everything of a name in several images (Molmo2-MultiImagePoint)"
    group = "point"
    scorers = ("pointing", "point_count")
    max_new_tokens = 1024
    folder = "pixmo_multi_points-validation"
    prepare = "molmo2 prepare pixmo_multi_points --split validation"


TASK = MultiImagePoint()
