"""PixMo-Cap (arXiv 2409.17146): detailed captions of the images that the published loader holds out of training.

Data: `molmo2 prepare pixmo_cap --split validation --out shards` writes shards/pixmo_cap-validation: up to 2,048 images,
of which those that are still online can be fetched.
Score: caption_recall and caption_length, both by rules of ours; with --judge, caption_f1. The released code has no
score for these captions; it writes them down (dense_caption_eval), with as many tokens.
"""

from molmo2_nemo.evaluation.shard_task import ShardTask


class PixmoCap(ShardTask):
    name = "pixmo_cap"
    title = "detailed captions of images (PixMo-Cap, held-out images)"
    group = "caption"
    scorers = ("caption_recall", "caption_length")
    max_new_tokens = 448
    folder = "pixmo_cap-validation"
    prepare = "molmo2 prepare pixmo_cap --split validation"


TASK = PixmoCap()
