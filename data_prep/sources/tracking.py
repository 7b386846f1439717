"""Tracking: Molmo2's own set, nine sets with several objects, and twelve with one object.

All share one schema. A row is one expression in one video (or clip) with the objects that it refers to, tracked through
the frames. The task is to track (every object in every frame), ground (first and last point), or single_point_track
(continue from a given point).

Videos are sampled at an integer frame rate that divides the video's own (`sampling` of the record); the answer has the
row's `sampling_fps`. Videos can be encoded files, or folders of frames, as most of these data sets are published.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.sources.base import (
    AnnotationJson,
    Context,
    Cut,
    File,
    FilmFrames,
    FirstOf,
    Frames,
    Hub,
    Match,
    Media,
    Row,
    Sample,
    Skip,
    Source,
    SourceError,
    Table,
    maybe,
    number,
)
from data_prep.sources.schema import one_of
from data_prep.sources.shapes import track
from data_prep.sources.shapes_video import UniqueKeys

STYLES = {
    "track": "video_point_track_per_frame",
    "ground": "video_point_ground_start_end",
    "single_point_track": "video_single_point_track_per_frame",
}
MAX_RATE = 10  # frames per second that are sampled at most
CHUNKS = 12  # of TrackingNet's training set
DEFAULT_FPS = 6  # of a video, if its row does not give it
MIXES = {"sft": "tracking"}
LICENCE = "see the card on the hub (that of molmo2-yt-vis says Apache 2.0); videos keep that of the original data set"
FIELDS: dict[str, Any] = {
    "id": one_of(str, int),
    "video": str,
    "expression": str,
    "fps": maybe(number),
    "sampling_fps": number,
    "width": number,
    "height": number,
    "mask_id": [one_of(str, int)],
    "frame_trajectories": maybe(
        [
            {
                "frame": int,
                "time": number,
                "points": [{"id": one_of(str, int), "point": [number], "occluded": maybe(bool)}],
            }
        ]
    ),
}


def sampling_rates(fps: float, most: int = MAX_RATE) -> list[int]:
    """Integer frame rates up to `most` that divide a video's own rate (rounded down); [] below 1 fps."""
    return [rate for rate in range(1, min(int(fps), most) + 1) if int(fps) % rate == 0]


def tracked(row: Row, task: str) -> AnnotationJson:
    """The annotation of a row. Objects are numbered by their position in `mask_id`; points of others are ignored."""
    numbers = {str(name): str(i) for i, name in enumerate(row["mask_id"])}
    frames = [
        {
            "frame": frame["frame"],
            "time": float(frame["time"]),
            "points": {
                numbers[str(p["id"])]: {"point": [float(v) for v in p["point"]], "occluded": bool(p.get("occluded"))}
                for p in frame["points"]
                if str(p["id"]) in numbers
            },
        }
        for frame in row.get("frame_trajectories") or ()
    ]
    size = float(row["width"]), float(row["height"])
    return track(row["expression"], frames or None, STYLES[task], size=size, sampling_fps=int(row["sampling_fps"]))


def _problem(row: Row, annotation: AnnotationJson, task: str) -> str:
    """The reason why a row cannot be used; "" if it can."""
    fps = row.get("fps") or DEFAULT_FPS
    if not sampling_rates(fps):
        return "no whole rate divides the video's"
    if row["sampling_fps"] < 1 or fps % row["sampling_fps"]:
        return "fps is no multiple of sampling_fps"
    if task == "single_point_track" and not any(
        not point["occluded"] for frame in annotation.get("points", ()) for point in frame["points"].values()
    ):
        return "no visible point to start from"
    return ""


def tracking_records(task: str, media: Callable[[Row, Mapping[str, float]], Media | None], native: Table | None) -> Any:
    """The `records` of a source with rows of this schema; `media` names the video of a row, None if nobody knows it."""

    def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
        unique = UniqueKeys()
        rates = _native_rates(ctx, native)
        for row in rows:
            key = unique(f"{row['id']}-{row['sampling_fps']:g}fps")
            annotation = tracked(row, task)
            video = media(row, rates)
            problem = _problem(row, annotation, task) or ("" if video is not None else "unknown video source")
            if problem:
                yield Skip(key, problem)
                continue
            sampling = {
                "frame_sample_mode": "fps",
                "candidate_sampling_fps": sampling_rates(row.get("fps") or DEFAULT_FPS),
            }
            yield Sample(key, [annotation], video=video, sampling=sampling)

    return records


def _native_rates(ctx: Context, table: Table | None) -> dict[str, float]:
    """Video -> frame rate of its folder of frames; empty where that is the annotated rate or unknown."""
    if table is None:
        return {}
    try:
        return {str(row[table.key]): float(row["value"]) for row in ctx.rows(table)}
    except SourceError:  # without it, encoded videos can still be used
        return {}


# --- where videos are ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VideoFolders:
    """The folders of a data set's encoded videos and, optionally, frames. `{video}` stands for the row's name,
    `{class}` for it without its number, `{chunk}` for each of TrackingNet's parts.

    The first folder of `videos` may be omitted.
    """

    videos: str
    frames: str = ""
    native: bool = False  # frames have the video's own rate (video_original_fps.json), not the row's
    films: tuple[str, ...] = ()  # the original films, at their own rate; "*" stands for any text

    def media(self, row: Row, rates: Mapping[str, float]) -> Media:
        video = row["video"]
        names = {"video": video, "class": re.sub(r"-\d+$", "", video)}
        paths = [self.videos.format(**names)]
        paths.append(paths[0].split("/", 1)[1])
        if not self.frames or (self.native and video not in rates):
            return File(*paths)
        fps = float(row.get("fps") or DEFAULT_FPS)
        step = max(1, round(rates.get(video, fps) / fps))
        folders = dict.fromkeys(self.frames.format(**names, chunk=chunk) for chunk in range(CHUNKS))
        found: list[Media] = [File(*paths), *(Frames(folder, fps, step=step) for folder in folders)]
        if self.films:
            film = Match(*(path.format(video=glob.escape(video)) for path in self.films))
            found.append(FilmFrames(film, fps, step=step))
        return FirstOf(*found)

    def words(self) -> str:
        found = [f"{self.videos}.mp4".replace("{video}", "<video>")]
        if self.frames:
            found.append(
                "frames in "
                + self.frames.replace("{video}", "<video>")
                .replace("{class}", "<class>")
                .replace("{chunk}", "<0 to 11>")
                + "/"
            )
        found += [path.replace("{video}", "<video>") for path in self.films]
        return " or ".join(found)


def _several(name: str, hub: str, title: str, fetch: str, folders: VideoFolders, tasks: Iterable[str]) -> list[Source]:
    """The sources of one data set with several objects, one per task."""
    native = Table("video_original_fps.json", repo=hub, key="video") if folders.native else None
    return [
        Source(
            name=f"{name}_{task}",
            mixes=MIXES,
            kind=f"video, {KINDS[task]}",
            origin=Hub(hub, configs=(task,), media=f"{title} ({fetch}): {folders.words()}"),
            licence=LICENCE,
            fields=FIELDS,
            records=tracking_records(task, folders.media, native),
            notes=NOTES,
        )
        for task in tasks
    ]


KINDS = {"track": "tracks", "ground": "first and last points", "single_point_track": "track of one point"}
NOTES = (
    "Rows at 1 and at 2 frames per second are both used. Rows whose rate does not divide the video's are left out, as "
    "are single-point rows without a visible point."
)
ALL = tuple(STYLES)
SEVERAL = [
    *_several(
        "mevis",
        "allenai/molmo2-mevis",
        "MeViS",
        "hub FudanCVL/MeViS",
        VideoFolders("MeViS/train/videos/{video}", "MeViS/MeViS_release/train/JPEGImages/{video}"),
        ALL,
    ),
    *_several(
        "ref_yt_vos",
        "allenai/molmo2-ref-yt-vos",
        "Refer-YouTube-VOS",
        "train.zip of the CodaLab competition 29139",
        VideoFolders("Ref-YT-VOS/train/videos/{video}", "Ref-YT-VOS/train/JPEGImages/{video}"),
        ("track",),
    ),
    *_several(
        "lv_vis",
        "allenai/molmo2-lv-vis",
        "LV-VIS",
        "train.zip from https://github.com/haochenheheda/LVVIS",
        VideoFolders("LV-VIS/train/videos/{video}", "LV-VIS/train/JPEGImages/{video}"),
        ALL,
    ),
    *_several(
        "vicas",
        "allenai/molmo2-vicas",
        "ViCaS",
        "hub kumuji/ViCaS",
        VideoFolders(
            "ViCaS/train/videos/{video}",
            "ViCaS/JPEGImages/{video}",
            native=True,
            films=("ViCaS/videos*/{video}.mp4", "ViCaS/videos*/{video}_*.mp4"),
        ),
        ALL,
    ),
    *_several(
        "revos",
        "allenai/molmo2-revos",
        "ReVOS",
        "JPEGImages.zip, access through https://github.com/cilinyan/ReVOS-api",
        VideoFolders("ReVOS/train/videos/{video}", "ReVOS/JPEGImages/{video}"),
        ALL,
    ),
    *_several(
        "burst",
        "allenai/molmo2-burst",
        "BURST on TAO-Amodal frames",
        "hub chengyenhsieh/TAO-Amodal, after signing",
        VideoFolders("TAO-Amodal/train/videos/{video}", "TAO-Amodal/frames/train/{video}", native=True),
        ALL,
    ),
    *_several(
        "ref_davis17",
        "allenai/molmo2-ref-davis17",
        "Ref-DAVIS17",
        "DAVIS-2017-trainval-480p.zip from https://davischallenge.org",
        VideoFolders("Ref-DAVIS17/train/videos/{video}", "Ref-DAVIS17/DAVIS/JPEGImages/480p/{video}"),
        ("track",),
    ),
    *_several(
        "yt_vis",
        "allenai/molmo2-yt-vis",
        "YouTube-VIS",
        "train.zip from https://youtube-vos.org/dataset/vis",
        VideoFolders("YT-VIS/train/videos/{video}", "YT-VIS/train/JPEGImages/{video}"),
        ("track",),
    ),
    *_several(
        "moca",
        "allenai/molmo2-moca",
        "MoCA",
        "MoCA.zip from https://www.robots.ox.ac.uk/~vgg/data/MoCA",
        VideoFolders("MoCA/videos/{video}", "MoCA/MoCA/JPEGImages/{video}"),
        ("track", "ground"),
    ),
]

# --- one object: config of allenai/molmo2-single-object-track -> where its videos are --------------------------------

SINGLE: dict[str, tuple[str, str, VideoFolders]] = {
    "webuav": ("WebUAV-3M", "Train", VideoFolders("WebUAV/videos/{video}", "WebUAV/Train/{video}/img")),
    "got10k": ("GOT-10k", "full_data.zip", VideoFolders("GOT-10k/videos/{video}", "GOT-10k/train/{video}")),
    "vasttrack": (
        "VastTrack",
        "train parts",
        VideoFolders("VastTrack/videos/{video}", "VastTrack/train/{class}/{video}/imgs"),
    ),
    "trackingnet": (
        "TrackingNet",
        "all chunks",
        VideoFolders("TrackingNet/videos/{video}", "TrackingNet/TRAIN_{chunk}/frames/{video}"),
    ),
    "lvosv1": ("LVOS v1", "train", VideoFolders("LVOSv1/train/videos/{video}", "LVOSv1/train/JPEGImages/{video}")),
    "lvosv2": ("LVOS v2", "train", VideoFolders("LVOSv2/train/videos/{video}", "LVOSv2/train/JPEGImages/{video}")),
    "lasot": ("LaSOT", "hub l-lt/LaSOT", VideoFolders("LaSOT/train/videos/{video}", "LaSOT/annotation/{video}/img")),
    "uwcot": ("UW-COT220", "its zip holds the videos", VideoFolders("UW-COT220/UW-COT220/{video}")),
    "webuot": ("WebUOT-1M", "Train; its zip holds the videos", VideoFolders("webuot/Train/{video}")),
    "latot": ("LaTOT", "all", VideoFolders("LaTOT/videos/{video}", "LaTOT/LaTOT/{video}/img")),
    "tnl2k": ("TNL2K", "train subsets", VideoFolders("TNL2K/videos/{video}", "TNL2K/{video}/imgs")),
    "tnllt": ("TNLLT", "all", VideoFolders("TNLLT/videos/{video}", "TNLLT/frames/{video}/imgs")),
}
SPELLED = {"tnllt": "tnnlt"}  # configurations whose name on the Hub is misspelled


def _single(name: str, title: str, fetch: str, folders: VideoFolders) -> Source:
    config = SPELLED.get(name, name)
    return Source(
        name=f"{name}_single_point_track",
        mixes=MIXES,
        kind=f"video, {KINDS['single_point_track']}",
        origin=Hub(
            "allenai/molmo2-single-object-track", configs=(config,), media=f"{title} ({fetch}): {folders.words()}"
        ),
        licence=LICENCE,
        fields=FIELDS,
        records=tracking_records("single_point_track", folders.media, None),
        notes=f"Configuration {config!r} (sic). {NOTES}" if config != name else NOTES,
    )


# --- Molmo2's own set: clips of sixteen sources ----------------------------------------------------------------------

_MOT_YEARS = ("MOT20", "MOT17", "MOT16")
CLIPS: dict[str, str] = {  # video_dataset -> folder of encoded clips
    "mose": "MOSE/videos/train",
    "mosev2": "MOSEv2/videos/train",
    "sav": "sav/sav_train/videos_fps6",
    "vipseg": "VIPSeg/videos/train",
    "animaltrack": "animaltrack/videos_all",
    "APTv2": "APTv2/videos",
    "bft": "bft/videos/train",
    "soccernet": "SoccerNet/videos/train",
    "sportsmot": "SportsMOT/videos/train",
    "teamtrack": "TeamTrack/videos/train",
    "mot2020": "MOT20/videos/train",
    "personpath22": "personpath22/videos/train",
    "dancetrack": "DanceTrack/videos/train",
    "bdd100k": "bdd100k/videos/train",
    "uavdt": "UAVDT/videos",
    "seadrones": "SeaDronesSee/videos/train",
}
CLIP_FRAMES: dict[str, str] = {  # video_dataset -> folder of the whole video's frames, at the rate of the row
    "mose": "MOSE/MOSE_release/train/JPEGImages/{video}",
    "mosev2": "MOSEv2/train/JPEGImages/{video}",
    "vipseg": "VIPSeg/VIPSeg_720P/images/{video}",
    "bft": "bft/JPEGImages/{video}",
    "soccernet": "SoccerNet/tracking/train/{video}/img1",
    "sportsmot": "SportsMOT/sportsmot_publish/dataset/train/{video}/img1",
    "dancetrack": "DanceTrack/train/{video}/img1",
    "uavdt": "UAVDT/UAV-benchmark-M/{video}",
    "seadrones": "SeaDronesSee/frames/{video}",
    "mot2020": "MOT20/{year}/train/{video}/img1",
    "APTv2": "APTv2/APTv2/data/{split_video}",
}
CLIP_FILMS: dict[str, tuple[str, ...]] = {  # video_dataset -> whole films that clips are cut from
    "teamtrack": ("TeamTrack/teamtrack/*/train/videos/{video}",),
    "personpath22": ("personpath22/full_videos/{video}",),
    "bdd100k": ("bdd100k/bdd100k/videos/train/{video}", "bdd100k/videos/train/{video}"),
}
SAV_FPS = 24  # of SA-V's films; its clips have every n-th frame
SAV_FRAMES = "sav/sav_train/JPEGImages_24fps/{video}"
SAV_FILMS = ("sav/sav_train/sav_*/{video}",)


def clip_media(row: Row, rates: Mapping[str, float]) -> Media | None:
    """The clip of a row: encoded, or made of its video or of the video's frames. None for an unknown source."""
    source, video, clip = row["video_dataset"], row["video"], row["clip"]
    if source not in CLIPS:
        return None
    file = File(f"{CLIPS[source]}/{clip}", f"{source}/{clip}")
    if source == "seadrones":  # parts of a long video are named after it, and share its frames
        video = video.rsplit("-", 1)[0]
    fps = float(row.get("fps") or DEFAULT_FPS)
    whole = clip == video or row.get("start_frame") is None
    first, last = (0, None) if whole else (row["start_frame"], row.get("end_frame"))
    if source == "sav":
        step = max(1, round(SAV_FPS / fps))
        film = Match(*(path.format(video=glob.escape(video)) for path in SAV_FILMS))
        frames = Frames(SAV_FRAMES.format(video=video), fps, first, last, step)
        return FirstOf(file, frames, FilmFrames(film, fps, first, last, step))
    if source in CLIP_FILMS:
        film = Match(*(path.format(video=glob.escape(video)) for path in CLIP_FILMS[source]))
        if first == 0 and last is None:
            return FirstOf(file, film)
        end = (last + 1) / fps if last is not None else math.inf
        return FirstOf(file, Cut(film, first / fps, end, whole_frames=True))
    if source not in CLIP_FRAMES:
        return file
    year = next((year for year in _MOT_YEARS if year in video), "MOT15")
    folder = CLIP_FRAMES[source].format(video=video, year=year, split_video=video.replace("_", "/", 2))
    return FirstOf(file, Frames(folder, fps, first, last))


def _molmo2(task: str, name: str) -> Source:
    return Source(
        name=name,
        mixes=MIXES,
        kind=f"video, {KINDS[task]}",
        origin=Hub(
            "allenai/molmo2-track-instruction",
            configs=(task,),
            media="clips of 16 data sets as <folder>/<clip>.mp4 with the folders "
            + ", ".join(CLIPS.values())
            + "; of "
            + ", ".join(CLIP_FRAMES)
            + " frames in the published folders will do; clips are cut from the films of "
            + ", ".join(path for paths in (SAV_FILMS, *CLIP_FILMS.values()) for path in paths[:1])
            .replace("{", "<")
            .replace("}", ">"),
        ),
        licence=LICENCE,
        fields={
            **FIELDS,
            "video_dataset": str,
            "clip": str,
            "start_frame": maybe(int),
            "end_frame": maybe(int),
        },
        records=tracking_records(task, clip_media, None),
        notes=NOTES,
    )


SOURCES: tuple[Source, ...] = (
    _molmo2("track", "molmo2_video_track"),
    _molmo2("ground", "molmo2_video_track_ground"),
    _molmo2("single_point_track", "molmo2_video_single_point_track"),
    *SEVERAL,
    *(_single(name, *entry) for name, entry in SINGLE.items()),
)
