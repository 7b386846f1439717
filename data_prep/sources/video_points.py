"""Pointing and counting in videos: Molmo2-VideoPoint by number of points, and academic sets converted to points.

Published rules: only clips of at most 63 s; every annotation must lie inside the clip; timestamps are counted from the
start of the clip on a grid of half seconds; every access draws either counting (with the stored question) or plain
pointing (with a template).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_prep.sources.base import AnnotationJson, Context, File, Hub, Media, Row, Sample, Skip, Source, maybe, number
from data_prep.sources.common import COORDINATES, coordinates
from data_prep.sources.shapes import either, turns, video_points
from data_prep.sources.shapes_video import Records, UniqueKeys, youtube_cc

MAX_SECONDS = 63.0
STEP = 0.5  # seconds; annotators saw two frames per second
P_MULTI_TURN = 0.2  # probability that the labels of a short video are one conversation instead of branches
OFF_GRID = "timestamp off the grid of half seconds"
OUTSIDE = "annotation outside its clip"
CONFIGS = (
    "action_or_event",
    "animal",
    "anomaly",
    "comparative reference",
    "indirect reference",
    "object",
    "referring expression",
    "spatial reference",
)
MIXES = {"sft": "video_pointing"}


@dataclass(frozen=True, slots=True)
class Pointed:
    """One label of a video with its points, and the clip it belongs to."""

    annotation: AnnotationJson
    clip: tuple[float, float]


def place_in_clip(
    row: Row, label: str, question: str | None, clip: tuple[float, float], duration: float, *, whole: float
) -> Pointed | str:
    """The annotation of a row with times from the start of the clip, or the reason why it cannot be used.

    Args:
        whole: duration in seconds, from 0, that a row without points refers to.
    """
    times = sorted(row["timestamps"])
    first, last = (times[0], times[-1]) if times else (0.0, whole)
    start, end = clip
    if not (0 <= start < end <= duration and end - start <= MAX_SECONDS and start <= first and last <= end):
        return OUTSIDE
    groups = [coordinates(group) for group in row["points"]]
    if len(groups) != len(times):
        return "lists of different lengths"
    placed = sorted(zip(row["timestamps"], groups, strict=True), key=lambda pair: pair[0])
    if any(abs(t / STEP - round(t / STEP)) > 1e-6 for t in times):
        return OFF_GRID
    shifted = [math.floor((t - start) / STEP + 1e-6) * STEP for t, _ in placed]
    made = video_points(label, shifted, [sorted(points) for _, points in placed], "video_point")
    return Pointed(
        either(made, {"style": "video_point_count", **({"question": question} if question else {})}, {}), clip
    )


# --- Molmo2-VideoPoint -----------------------------------------------------------------------------------------------


def pointed_video(row: Row) -> Media:
    """The video of a row: the published 2-fps version, or the video itself."""
    name, source = row["video_id"], row["video_source"]
    if "/" in name:  # generated videos: <generator>/<name>
        generator, stem = name.rsplit("/", 1)
        return File(f"generated_videos/{generator}-2fps/{stem}_2fps", f"generated_videos/{name}")
    youtube = [f"youtube-cc/youtube-cc-{part}-2fps/{name}_2fps" for part in ("exist", "kw", "temporal")]
    mammal = [f"MammalNet/trimmed_video-2fps/{name}_2fps", f"MammalNet/trimmed_video/{name}"]
    plain = youtube_cc(name).paths
    made = [f"generated_videos/{name}_2fps", f"generated_videos/{name}"]
    return File(*{"youtube": [*youtube, *plain], "MammalNet": mammal}.get(source, [*youtube, *mammal, *made, *plain]))


def _clip(row: Row) -> tuple[float, float] | str:
    """The clip of a row: all of a short video, otherwise the stored clip; or the reason why the row is left out."""
    start, end, duration = row.get("clip_start"), row.get("clip_end"), row["video_duration"]
    if start is not None and end is not None and end - start > MAX_SECONDS:
        return "clip longer than 63 s"
    if duration <= MAX_SECONDS:
        return 0.0, float(duration)
    return "long video without a clip" if start is None or end is None else (float(start), float(end))


def _point_rows(fewest: int, most: int) -> Records:
    def pointed(row: Row) -> Pointed | str:
        if row.get("annotator_unsure"):
            return "annotator was not sure"
        if not fewest <= row["count"] <= most:
            return f"not {fewest} to {most} points"
        clip = _clip(row)
        if isinstance(clip, str):
            return clip
        duration = float(row["video_duration"])
        row = {**row, "timestamps": row["two_fps_timestamps"]}
        return place_in_clip(row, row["label"], row["question"], clip, duration, whole=min(duration, MAX_SECONDS))

    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        for video, group in ctx.grouped(rows, "video_id"):
            kept: list[Pointed] = []
            for i, row in enumerate(group):
                found = pointed(row)
                if isinstance(found, str):
                    yield Skip(f"{video}#{i}", found)
                else:
                    kept.append(found)
            media = pointed_video(group[0])
            if len(kept) > 1 and group[0]["video_duration"] <= MAX_SECONDS:
                yield _short_video(video, kept, media, float(group[0]["video_duration"]))
            else:
                for i, one in enumerate(kept):
                    yield Sample(f"{video}/{i}", [one.annotation], video=media, clip=one.clip)

    return records


def _short_video(video: str, kept: Sequence[Pointed], media: Media, duration: float) -> Sample:
    """All labels of a video short enough to be shown whole: as branches, or with P_MULTI_TURN as one conversation."""
    branches = [one.annotation for one in kept]
    return Sample(
        video,
        video=media,
        clip=(0.0, duration),
        variants=[branches, [turns(branches, "video_point")]],
        variant_weights=[1 - P_MULTI_TURN, P_MULTI_TURN],
    )


def _molmo2_points(fewest: int, most: int) -> Source:
    return Source(
        name=f"molmo2_video_point_minmax_{fewest}_{most}",
        mixes=MIXES,
        kind=f"video, {fewest} to {most} points",
        origin=Hub(
            "allenai/Molmo2-VideoPoint",
            configs=CONFIGS,
            media="youtube-cc/youtube-cc-{exist,kw,temporal}-2fps/<id>_2fps.mp4 (or youtube-cc/<id>.mp4), "
            "MammalNet/trimmed_video-2fps/<id>_2fps.mp4, generated_videos/<generator>-2fps/<name>_2fps.mp4",
        ),
        licence="ODC-BY 1.0 (annotations); the videos keep their owners' licences",
        fields={
            "video_id": str,
            "video_source": str,
            "video_duration": number,
            "label": str,
            "question": maybe(str),
            "count": int,
            "points": [COORDINATES],
            "two_fps_timestamps": [number],
            "clip_start": maybe(number),
            "clip_end": maybe(number),
            "annotator_unsure": maybe(bool),
        },
        records=_point_rows(fewest, most),
        published_as=f"vixmo_points_minmax_{fewest}_{most}",
        notes="Clips over 63 s and rows whose annotations leave their clip are left out, as are those of which the "
        "annotator was not sure (the data set's card says so of training; the released loader keeps them). Labels of "
        "a video of at most 63 s are one record: a tree, or in a fifth of the accesses one conversation. Rows of one "
        "video are gathered by id (the published loader: by file).",
    )


# --- academic sets ---------------------------------------------------------------------------------------------------

ACADEMIC_VIDEOS: Mapping[str, Callable[[Row], tuple[str, str]]] = {  # subset -> folder, name
    "lvvis": lambda row: ("LV-VIS/train/videos", row["video_name"]),
    "ovis": lambda row: ("OVIS/videos", row["video_name"]),
    "burst": lambda row: ("TAO-Amodal/train/videos", f"{row.get('dataset') or ''}/{row['video_name']}".lstrip("/")),
    "refdavis17": lambda row: ("Ref-DAVIS17/train/videos", row["video_name"]),
    "mevis": lambda row: ("mevis/MeViS_release/train/videos", row["video_name"]),
    "refyoutube": lambda row: ("Ref-YT-VOS/train/videos", row["video_name"]),
}
MAX_ACADEMIC_POINTS = 60


def academic_video(row: Row) -> Media | None:
    """The video of a row: the published 2-fps version, or the tracking set's own; None for an unknown subset."""
    if row["subset"] not in ACADEMIC_VIDEOS:
        return None
    folder, name = ACADEMIC_VIDEOS[row["subset"]](row)
    tracking = [f"MeViS/train/videos/{name}"] if row["subset"] == "mevis" else []  # where the tracking sets have it
    return File(f"{folder}-2fps/{name}", f"{folder}/{name}", *tracking)


def _academic(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    unique = UniqueKeys()
    for row in rows:
        label, times = row["category"].lower(), row["timestamps"]
        key = unique(f"{row['subset']}/{row.get('dataset') or ''}/{row['video_name']}/{label}")
        video = academic_video(row)
        if video is None:
            yield Skip(key, "unknown subset")
        elif row["count"] > MAX_ACADEMIC_POINTS:
            yield Skip(key, f"more than {MAX_ACADEMIC_POINTS} points")
        elif not times:
            yield Skip(key, "no timestamps")
        elif max(times) - min(times) > MAX_SECONDS:
            yield Skip(key, "annotation longer than 63 s")
        else:
            clip = float(row["clip_start_time"]), float(row["clip_end_time"])
            found = place_in_clip(row, label, None, clip, float(row["video_duration"]), whole=0.0)
            if isinstance(found, str):
                yield Skip(key, found)
            else:
                yield Sample(key, [found.annotation], video=video, clip=clip)


SOURCES: tuple[Source, ...] = (
    _molmo2_points(0, 5),
    _molmo2_points(6, 25),
    _molmo2_points(26, 60),
    Source(
        name="academic_video_points",
        mixes=MIXES,
        kind="video, points",
        origin=Hub(
            "allenai/molmo2-academic-video-points",
            media="videos of the tracking sets: {LV-VIS,Ref-DAVIS17,Ref-YT-VOS,TAO-Amodal}/train/videos/<name>, "
            "OVIS/videos/<name>, mevis/MeViS_release/train/videos/<name>, or their 2-fps versions in videos-2fps/",
        ),
        licence="ODC-BY 1.0 (annotations); for the videos see each tracking set",
        fields={
            "subset": str,
            "video_name": str,
            "dataset": maybe(str),
            "category": str,
            "count": int,
            "timestamps": [number],
            "points": [COORDINATES],
            "video_duration": number,
            "clip_start_time": number,
            "clip_end_time": number,
        },
        records=_academic,
        published_as="academic_points_clip_63s_2fps",
        notes="Labels in lower case, wording always from a template. More than 60 points or 63 s are left out.",
    ),
)
