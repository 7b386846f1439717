"""Molmo2-VideoTrackEval: track everything that an expression names through a video, at one frame per second.

Data: allenai/Molmo2-VideoTrackEval of huggingface.co (split test, 3.7k expressions, with masks), in
Molmo2-VideoTrackEval/; its videos are clips of APTv2, DanceTrack, SportsMOT, PersonPath22 and SA-V, named
`<clip>.mp4`, in any folders below it. They have to be cut from the publishers' own files, as its card says.
Score: track (F1, HOTA) with the published masks, as released; each mask is that of its object (docs/evaluation.md).
Not the paper's J&F: it compares masks, and would need a segmentation model that makes masks of the answered points.
Broken down by the data set that a video is from.
"""

from __future__ import annotations

from typing import Any

from molmo2_nemo.evaluation.published_videos import PublishedVideos, Row, mask_of

RATE = 1  # positions per second that are asked for
MAX_RATE = 10  # frames per second that are shown at most


class Track(PublishedVideos):
    name = "track"
    title = "track what an expression names (Molmo2-VideoTrackEval): F1, HOTA of points; J&F needs a segmentation model"
    group = "track"
    scorers = ("track",)
    max_new_tokens = 2048
    dataset = "allenai/Molmo2-VideoTrackEval"
    columns = ("id", "clip", "exp", "fps", "w", "h", "mask_id", "points", "masks", "video_dataset")

    def video_names(self, row: Row) -> list[str]:
        return [f"{row['video_dataset']}/{row['clip']}", row["clip"]]

    def record(self, row: Row) -> dict[str, Any]:
        fps = row["fps"]
        frames = [
            {"time": frame / fps, "points": {name: {"point": list(point)} for name, point in points.items()}}
            for frame, points in positions(row).items()
        ]
        asked = {"style": "video_point_track_per_frame", "label": row["exp"], "width": row["w"], "height": row["h"]}
        rates = [rate for rate in range(RATE, min(int(fps), MAX_RATE) + 1) if int(fps) % rate == 0]
        return {
            "annotations": [{**asked, "sampling_fps": RATE, "points": frames}],
            "sampling": {"frame_sample_mode": "fps", "candidate_sampling_fps": rates},
        }

    def reference(self, row: Row) -> Any:
        found = positions(row)
        by_object = {str(entry["object_id"]): entry["masks"] for entry in row["masks"]}
        frames = [
            {"time": frame / row["fps"], "points": {name: list(point) for name, point in points.items()}}
            for frame, points in found.items()
        ]
        return {
            "frames": frames,
            "size": [row["w"], row["h"]],
            "fps": row["fps"],
            "masks": {name: [mask_at(masks, frame) for frame in found] for name, masks in by_object.items()},
        }

    def tags(self, row: Row) -> dict[str, str]:
        return {"source": str(row["video_dataset"])}


def positions(row: Row) -> dict[int, dict[str, Any]]:
    """Frame -> object -> its point, of the frames at RATE in which an object is; objects are named as in the table."""
    step = max(1, int(row["fps"] // RATE))
    known = {str(name) for name in row["mask_id"]}
    found: dict[int, dict[str, Any]] = {}
    for entry in row["points"]:
        for frame, point in enumerate(entry["points"]):
            if point and frame % step == 0 and str(entry["object_id"]) in known:
                found.setdefault(frame, {})[str(entry["object_id"])] = point
    return dict(sorted(found.items()))


def mask_at(masks: list[Any], frame: int) -> dict[str, Any] | None:
    """The mask of an object in a frame: the entry that names the frame or, where none does, that of its number."""
    first = next((mask for mask in masks if mask is not None), None)
    if first is not None and "frame" in first:
        masks = [mask["mask"] for mask in masks if mask is not None and mask["frame"] == frame]
        frame = 0
    return mask_of(masks[frame]) if frame < len(masks) and masks[frame] is not None else None


TASK = Track()
