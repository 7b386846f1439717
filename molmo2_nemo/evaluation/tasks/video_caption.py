"""Captions of videos of your own: what the released code measures on its own test videos, which are not published.

Data: a file of lines {"video": "talk.mp4", "caption": "..."}, called video_caption.jsonl, and
`molmo2 prepare video_caption.jsonl --out shards --hold-out 5%`, which writes shards/video_caption-validation beside the
training set; a folder of that name from anywhere else serves as well.
Score: caption_recall and caption_length, both by rules of ours; with --judge, caption_f1, which is the published
figure's definition (VixMoCaptionEval) with questions of our own, and so not comparable to figures of the paper. The
limit of 2,048 tokens is the released one.
"""

from molmo2_nemo.evaluation.shard_task import ShardTask


class VideoCaption(ShardTask):
    name = "video_caption"
    title = "detailed captions of videos of your own (video_caption-validation)"
    group = "caption"
    scorers = ("caption_recall", "caption_length")
    max_new_tokens = 2048
    video = True
    folder = "video_caption-validation"
    prepare = "molmo2 prepare video_caption.jsonl --out shards --hold-out 5%"


TASK = VideoCaption()
