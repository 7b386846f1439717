"""Molmo2-VideoPointEval: point at everything of a name in a video, in space and time.

Data: allenai/Molmo2-VideoPointEval of huggingface.co (split val) with masks, in Molmo2-VideoPointEval/; its videos are
those of Molmo2-VideoPoint, `<video_id>_2fps.mp4` or as they came, in any folders below it.
Score: video_point with the published masks, as released; asked as released, to count by pointing.
"""

from __future__ import annotations

from typing import Any

from molmo2_nemo.evaluation.published_videos import PublishedVideos, Row, mask_of

MASK_FPS = 2  # frames per second of which the masks' frame numbers count


class VideoPoint(PublishedVideos):
    name = "video_point"
    title = "point at everything of a name in a video (Molmo2-VideoPointEval, with masks)"
    group = "point"
    scorers = ("video_point", "video_point_count")
    max_new_tokens = 1024
    dataset = "allenai/Molmo2-VideoPointEval"
    columns = (
        *("video_id", "label", "width", "height", "video_duration"),
        *("two_fps_timestamps", "points", "masks"),
    )

    def video_names(self, row: Row) -> list[str]:
        head, slash, name = row["video_id"].rpartition("/")
        generated = [f"{head}-2fps/{name}_2fps"] if slash else []
        return [*generated, f"{row['video_id']}_2fps", row["video_id"]]

    def record(self, row: Row) -> dict[str, Any]:
        label = row["label"]
        asked = {
            "style": "video_point_count",
            "question": f'How many "{label}" are there in the video?',
            "label": label,
        }
        points = [[[100 * p["x"] / row["width"], 100 * p["y"] / row["height"]]] for p in row["points"]]
        return {"annotations": [{**asked, "point_scale": 100, "timestamps": _times(row), "points": points}]}

    def reference(self, row: Row) -> Any:
        tublets = [
            [{"time": mask["frame_id"] / MASK_FPS, "mask": mask_of(mask["rle"])} for mask in masks]
            for masks in row["masks"]
        ]
        return {
            "timestamps": _times(row),
            "points": [[[p["x"], p["y"]]] for p in row["points"]],
            "size": [row["width"], row["height"]],
            "duration": row["video_duration"],
            "masks": [[tublet] for tublet in tublets],
        }


def _times(row: Row) -> list[float]:
    return [float(time) for time in row["two_fps_timestamps"][: len(row["points"])]]


TASK = VideoPoint()
