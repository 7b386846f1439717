"""Molmo2-VideoCountEval: how many things or events of a name are in a video, or in a clip of it.

Data: allenai/Molmo2-VideoCountEval of huggingface.co (split val), in Molmo2-VideoCountEval/; its videos are those of
Molmo2-VideoPoint, `<video_id>_2fps.mp4` or as they came, in any folders below it.
Score: video_point_count, as released; figures are broken down by category, as released.
"""

from __future__ import annotations

from typing import Any

from molmo2_nemo.evaluation.published_videos import PublishedVideos, Row
from molmo2_nemo.evaluation.tasks.video_point import TASK as VIDEO_POINT


class VideoCount(PublishedVideos):
    name = "video_count"
    title = "how many things or events of a name are in a video (Molmo2-VideoCountEval)"
    group = "point"
    scorers = ("video_point_count",)
    max_new_tokens = 1024
    dataset = "allenai/Molmo2-VideoCountEval"
    columns = ("video_id", "question", "count", "category", "clip_start", "clip_end")

    def video_names(self, row: Row) -> list[str]:
        return list(VIDEO_POINT.video_names(row))

    def record(self, row: Row) -> dict[str, Any]:
        asked = {"style": "video_count", "question": row["question"], "answer": str(row["count"])}
        clip = [row["clip_start"], row["clip_end"]]
        return {"annotations": [asked], **({} if None in clip else {"clip": clip})}

    def reference(self, row: Row) -> Any:
        return {"count": row["count"]}

    def tags(self, row: Row) -> dict[str, str]:
        return {"category": str(row["category"])}


TASK = VideoCount()
