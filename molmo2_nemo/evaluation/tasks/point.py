"""PixMo-Points (arXiv 2409.17146): point at everything of a name in an image.

Data: images that the released loaders hold out of training: `molmo2 prepare pixmo_points_train --split validation`.
Score: pointing, without masks: a point is right near the annotators'. The published figure is of pixmo-points-eval,
whose masks say what is right; its images come from their sites and its masks from the Hub, which `molmo2 prepare` does
not bring together.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.shard_task import ShardTask


class Point(ShardTask):
    name = "point"
    title = "point at everything of a name in an image (PixMo-Points, held out)"
    group = "point"
    scorers = ("pointing", "point_count")
    max_new_tokens = 512
    folder = "pixmo_points_train-validation"
    prepare = "molmo2 prepare pixmo_points_train --split validation"


TASK = Point()
