"""Academic sets of labels and captions of videos, or of the part of a video that a label is about.

The prompt for a label is one of a few questions, chosen once per label. Parts of long videos are records with a `clip`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from data_prep.sources.base import (
    AnnotationJson,
    Context,
    Cut,
    File,
    FirstOf,
    Row,
    Sample,
    Skip,
    Source,
    Table,
    maybe,
    number,
)
from data_prep.sources.common import local
from data_prep.sources.schema import one_of
from data_prep.sources.shapes import caption, qa
from data_prep.sources.shapes_video import (
    CELL,
    CORRUPT,
    EMPTY_ANSWER,
    EMPTY_CLIP,
    ODC,
    Branches,
    below,
    clip_name,
    manual,
    open_ended,
    per_group,
    per_row,
    pick,
    seconds,
    text,
)
from data_prep.sources.video_academic_clips import ego4d_video
from molmo2_nemo.data.templates import ACTION_QUESTIONS, PERSON_QUESTIONS

if TYPE_CHECKING:
    import numpy as np

LABEL, CLIP_LABEL = "video, label", "video clips, label"
GCS = "https://storage.googleapis.com/molmo-datasets"  # the released loader's lists of corrupt files


Part = tuple[float | None, float | None, AnnotationJson | str]  # start and end in seconds; annotation, or why none


def labelled(
    style: str, label: str, questions: Sequence[str] = ACTION_QUESTIONS
) -> Callable[[Row, np.random.Generator], Branches]:
    """`branches` that ask for the label in one column."""

    def branches(row: Row, rng: np.random.Generator) -> Branches:
        answer = text(row[label])
        return [qa(pick(rng, questions), answer, style)] if answer.strip() else EMPTY_ANSWER

    return branches


def clips_of(
    video: str,
    media: File,
    parts: Iterable[Part],
) -> Iterator[Sample | Skip]:
    """One record per (start, end) of a video, with all annotations of that part; a string says why there is none."""
    gathered: dict[tuple[float, float], list[AnnotationJson]] = {}
    for i, (start, end, annotation) in enumerate(parts):
        if start is None or end is None or end <= start:
            yield Skip(f"{video}#{i}", EMPTY_CLIP)
        elif isinstance(annotation, str):
            yield Skip(f"{video}#{i}", annotation)
        else:
            gathered.setdefault((float(start), float(end)), []).append(annotation)
    for (start, end), labels in gathered.items():
        yield Sample(f"{video}_{start}_{end}", labels, video=media, clip=(start, end))


def _segment(entry: Mapping[str, Any]) -> tuple[float | None, float | None]:
    segment = entry.get("segment")
    if not isinstance(segment, (list, tuple)) or len(segment) != 2:
        return None, None
    return seconds(segment[0]), seconds(segment[1])


# --- captions --------------------------------------------------------------------------------------------------------


def _motion(row: Row, rng: np.random.Generator) -> Branches:
    return [caption(row["motion_caption"], "video_motion_caption")] if row["motion_caption"] else "no caption"


def _narrated(row: Row, rng: np.random.Generator) -> Branches:
    """A caption for every actor; the prompt gives the actor's name."""
    if len(row["captions"]) != len(row["actor_names"]):
        return "lists of different lengths"
    return [
        {**caption(words, "video_object_caption"), "object": actor.lower()} if words else "no caption"
        for words, actor in zip(row["captions"], row["actor_names"], strict=True)
    ]


# --- labels of whole videos ------------------------------------------------------------------------------------------


def _moments(row: Row, rng: np.random.Generator) -> Branches:
    """Labels such as `adult+female+singing` are joined with spaces; those that only name the speaker are left out."""
    label = row["label"].replace("+", " ")
    if "+" in row["label"] and label.startswith(("child ", "adult ")):
        return "label of who speaks"
    return labelled("moments_in_time_label", "label")({"label": label}, rng)


KINETICS_LABELS = Table("kinetics710/k710_label_map.txt")
KINETICS_CORRUPT = Table("kinetics_corrupt.parquet", url=f"{GCS}/kinetics_corrupt.parquet")


def _kinetics(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    """Lines `path label_number` of the lists of Kinetics-700 and Kinetics-600, with the labels of Kinetics-710."""
    labels = [row["line"].strip() for row in ctx.rows(KINETICS_LABELS)]
    corrupt = {text(row["video"]) for row in ctx.rows(KINETICS_CORRUPT)}
    for row in rows:
        path, _, index = row["line"].strip().rpartition(" ")
        part = "kinetics600" if "k600" in PurePosixPath(row["__table__"]).name else "kinetics700"
        name = PurePosixPath(path).name
        if not index.isdigit() or int(index) >= len(labels) or not name:
            yield Skip(f"{part}/{path or row['line']}", "line without a known label")
            continue
        label = labels[int(index)]
        folder = label.replace(" ", "_") if part == "kinetics600" else label
        found = f"{part}/train/{folder}/{name}"
        if found in corrupt:
            yield Skip(found, CORRUPT)
        else:
            asked = pick(ctx.rng(found), PERSON_QUESTIONS)
            yield Sample(found, [qa(asked, label, "kinetics_label")], video=File(found))


# --- labels of parts -------------------------------------------------------------------------------------------------


def _charades(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    """Lines `video start end##sentence`."""

    def read(row: Row) -> Row:
        place, _, sentence = row["line"].strip().partition("##")
        video, start, end = (*place.split(" "), "", "", "")[:3]
        return {"video": video, "start": seconds(start), "end": seconds(end), "sentence": sentence}

    ask = labelled("charades_sta", "sentence", PERSON_QUESTIONS)

    def branches(row: Row, rng: np.random.Generator) -> Branches:
        if row["start"] is None or row["end"] is None or row["end"] <= row["start"]:
            return EMPTY_CLIP
        return ask(row, rng)

    def visual(group: list[Row]) -> dict[str, Any]:
        row = group[0]
        return {"video": below("Charades_v1", row["video"]), "clip": (row["start"], row["end"])}

    key = lambda row: f"{row['video']}_{row['start']}_{row['end']}"  # noqa: E731
    yield from per_group(key, branches, visual)(map(read, rows), ctx)


COIN_CORRUPT = Table("coin_corrupt.parquet", url=f"{GCS}/coin_corrupt.parquet")


def _coin(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    corrupt = {
        (text(row["video_id"]), row["metadata"]["clip_start_time"], row["metadata"]["clip_end_time"])
        for row in ctx.rows(COIN_CORRUPT)
    }
    for row in rows:
        video = row["video_id"]
        if "train" not in row["subset"]:
            yield Skip(video, "not in the training split")
            continue
        rng = ctx.rng(video)
        parts: list[Part] = []
        for entry in row["annotation"]:
            start, end = _segment(entry)
            annotation = qa(pick(rng, ACTION_QUESTIONS), entry["label"], "coin_label")
            parts.append((start, end, CORRUPT if (video, start, end) in corrupt else annotation))
        yield from clips_of(video, File(f"videos/{video}"), parts)


YOUCOOK2_CORRUPT = frozenset({("UB1_MNpdvgs", 595.0, 613.0), ("UB1_MNpdvgs", 624.0, 635.0)})


def _youcook2(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    """Every step in two ways: as the label of its part, and as the caption of a time span of the whole video."""
    for row in rows:
        video, media = row["video_id"], File(f"videos/{row['video_id']}")
        if "train" not in row["subset"]:
            yield Skip(video, "not in the training split")
            continue
        rng = ctx.rng(video)
        parts: list[Part] = []
        spans: list[AnnotationJson] = []
        for entry in row["annotations"]:
            start, end = _segment(entry)
            sentence = entry["sentence"] if entry["sentence"].endswith(".") else entry["sentence"] + "."
            if start is not None and end is not None and end > start:
                span = caption(sentence, "video_clip_short_caption_start_end")
                spans.append({**span, "start": start, "end": end})
            annotation = qa(pick(rng, ACTION_QUESTIONS), sentence, "youcook2_label")
            parts.append((start, end, CORRUPT if (video, start, end) in YOUCOOK2_CORRUPT else annotation))
        yield from clips_of(video, media, parts)
        if spans:
            yield Sample(video, spans, video=media)


ACTIVITYNET_QUESTIONS, ACTIVITYNET_ANSWERS = Table("train_q.json"), Table("train_a.json")


def _activitynet(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    """Labels of parts, without duplicates; then the questions of ActivityNet-QA, one record per video."""
    for row in rows:
        rng = ctx.rng(row["video_id"])
        parts: dict[tuple[Any, ...], Part] = {}
        for entry in row["annotations"]:
            start, end = _segment(entry)
            annotation = qa(pick(rng, ACTION_QUESTIONS), entry["label"], "activitynet_label")
            parts.setdefault((start, end, entry["label"]), (start, end, annotation))
        yield from clips_of(row["video_id"], _activitynet_video(row["video_id"]), parts.values())
    answers = {text(row["question_id"]): row["answer"] for row in ctx.rows(ACTIVITYNET_ANSWERS)}

    def branches(row: Row, rng: np.random.Generator) -> Branches:
        question = row["question"] if row["question"].endswith("?") else row["question"].strip() + "?"
        return [open_ended(question, answers.get(text(row["question_id"])))]

    visual = lambda group: {"video": _activitynet_video(group[0]["video_name"])}  # noqa: E731
    yield from per_group(lambda row: f"qa/{row['video_name']}", branches, visual)(ctx.rows(ACTIVITYNET_QUESTIONS), ctx)


def _activitynet_video(name: str) -> File:
    return File(*(f"all-videos/{v}{name}{rest}" for v in ("", "v_") for rest in ("", f"/{v}{name}")))


EPIC_CORRUPT = frozenset(
    {"P01_102_229.910_234.300", "P01_102_90.240_93.490", "P01_104_65.170_92.450", "P02_118_722.700_723.550"}
)


def _epic_name(row: Row) -> str:
    start, end = seconds(row["start_timestamp"]) or 0.0, seconds(row["stop_timestamp"]) or 0.0
    return clip_name(row["video_id"], start, end, 3)


def _epic(row: Row, rng: np.random.Generator) -> Branches:
    start, end = seconds(row["start_timestamp"]), seconds(row["stop_timestamp"])
    if start is None or end is None or end <= start:
        return EMPTY_CLIP
    return CORRUPT if _epic_name(row) in EPIC_CORRUPT else labelled("epic_kitchens_label", "narration")(row, rng)


def _epic_seen(rows: list[Row]) -> dict[str, Any]:
    """The clip that was cut in advance, or else one cut from the whole video."""
    row, person = rows[0], rows[0]["participant_id"]
    made = File(f"epic-kitchens-clips/{person}/videos/{_epic_name(row)}")
    start, end = seconds(row["start_timestamp"]) or 0.0, seconds(row["stop_timestamp"]) or 0.0
    folder = f"{person}/videos/{row['video_id']}"
    return {"video": FirstOf(made, Cut(File(f"epic-kitchens/{folder}", folder), start, end))}


def _ego4d(row: Row, rng: np.random.Generator) -> Branches:
    """Ready-made questions; the style (label, label of a span, grounding) comes with each."""
    if row.get("corrupt"):
        return CORRUPT
    return [open_ended(said["question"], said["answer"], said["style"]) for said in row["message_list"]]


def _ego4d_seen(rows: list[Row]) -> dict[str, Any]:
    """The cached clip, or else the same span (which is part of its name) cut from the whole video."""
    name = PurePosixPath(rows[0]["clip"]).stem
    cut = below("ego4d-clips", name)
    parts = name.removesuffix("_custom_clip").rsplit("_", 2)
    start, end = (seconds(parts[1]), seconds(parts[2])) if len(parts) == 3 else (None, None)
    if start is None or end is None or end <= start:
        return {"video": cut}
    return {"video": FirstOf(cut, Cut(ego4d_video(parts[0]), start, end))}


SEGMENTS = [{"segment": maybe(list), "label": str}]

SOURCES: tuple[Source, ...] = (
    manual(
        "motionbench_train",
        "video, caption of motion",
        "MotionBenchCaption-train of the hub's zai-org/MotionBench, videos unpacked; train.jsonl is fetched from there",
        Table("MotionBenchCaption-train/train.jsonl", repo="zai-org/MotionBench"),
        "MotionBenchCaption-train/videos/<video_path>",
        {"video_path": str, "motion_caption": str},
        per_row(
            "video_path",
            _motion,
            lambda rows: {"video": local(f"MotionBenchCaption-train/videos/{rows[0]['video_path']}")},
        ),
    ),
    manual(
        "moments_in_time_qa",
        LABEL,
        "Moments_in_Time_Raw from https://moments.csail.mit.edu, after filling in its form; train.csv needs the "
        "columns label "
        "and video_path",
        Table("train.csv"),
        "train-videos/<video_path>",
        {"label": str, "video_path": str},
        per_group("video_path", _moments, lambda rows: {"video": local(f"train-videos/{rows[0]['video_path']}")}),
        licence="for non-commercial research, see the form",
        notes="Labels that only say who speaks (child+..., adult+...) are left out.",
    ),
    manual(
        "kinetics_qa",
        LABEL,
        "Kinetics-600 and -700 training videos (https://github.com/cvdfoundation/kinetics-dataset) and the lists of "
        "Kinetics-710 (UniFormerV2)",
        (Table("kinetics710/k700_train_list_videos.txt"), Table("kinetics710/k600_train_list_videos.txt")),
        (
            "kinetics700/train/<label>/<name>.mp4",
            "kinetics600/train/<label with _ for blanks>/<name>.mp4",
            "kinetics710/k710_label_map.txt",
        ),
        {"line": str},
        _kinetics,
        licence="CC BY 4.0 (annotations)",
    ),
    manual(
        "charades_sta_all_qa",
        CLIP_LABEL,
        "charades_sta_train.txt (https://github.com/jiyanggao/TALL) and the Charades_v1 videos",
        Table("charades_sta_train.txt"),
        "Charades_v1/<video>.mp4",
        {"line": str},
        _charades,
        licence="Charades: for non-commercial use",
    ),
    manual(
        "coin_all_qa",
        CLIP_LABEL,
        "COIN.json and the videos, as https://github.com/coin-dataset/annotations describes",
        Table("COIN.json", at=("database",), key="video_id"),
        "videos/<YouTube id>.mp4 (or .mkv, .webm)",
        {"video_id": str, "subset": str, "annotation": SEGMENTS},
        _coin,
        notes="Parts known to be corrupt are left out.",
    ),
    manual(
        "youcook2_all_qa",
        "video clips, label; video, captions of spans",
        "youcookii_annotations_trainval.json and the videos, from https://youcook2.eecs.umich.edu",
        Table("youcookii_annotations_trainval.json", at=("database",), key="video_id"),
        "videos/<YouTube id>.mp4 (or .mkv, .webm)",
        {"video_id": str, "subset": str, "annotations": [{"segment": maybe(list), "sentence": str}]},
        _youcook2,
        notes="As published, the prompt of a caption of a time span names its style but not the span.",
    ),
    manual(
        "activitynet_all_qa",
        "video clips, label; video, question and answer",
        "activity_net.v1-3.min.json and the videos (https://activity-net.org), train_q.json and train_a.json "
        "(https://github.com/MILVLG/activitynet-qa, folder dataset)",
        Table("activity_net.v1-3.min.json", at=("database",), key="video_id"),
        "all-videos/<YouTube id>.mp4",
        {"video_id": str, "annotations": SEGMENTS},
        _activitynet,
        notes="As published, labels come from every annotated video, the validation split included.",
    ),
    manual(
        "ego4d_all",
        "video clips, label and grounding",
        "Ego4D videos (https://ego4d-data.org, after signing) or the clips cut from them; the questions are fetched",
        Table("ego4d_cached_train_metadata.parquet", url=f"{GCS}/ego4d_cached_train_metadata.parquet"),
        "ego4d-clips/<video>_<start>_<end>_custom_clip.mp4, or Ego4d/ego4d_data/v2/full_scale/<video>.mp4",
        {
            "clip": str,
            "corrupt": maybe(one_of(bool, number)),
            "message_list": [{"question": str, "answer": CELL, "style": str}],
        },
        per_row("clip", _ego4d, _ego4d_seen),
        licence="Ego4D licence agreement",
        notes="Styles are those of the file: ego4d_mq_label_clip, ego4d_mq_label_start_end, "
        "ego4d_mq_temporal_grounding, ego4d_nlq_temporal_grounding.",
    ),
    manual(
        "epic_kitchens_qa",
        CLIP_LABEL,
        "EPIC_100_train.csv and the videos, from https://epic-kitchens.github.io",
        Table("epic-kitchens-100-annotations/EPIC_100_train.csv"),
        "epic-kitchens/<P01>/videos/<video_id>.mp4, or clips as "
        "epic-kitchens-clips/<P01>/videos/<video_id>_<start>_<end>.mp4",
        {
            "participant_id": str,
            "video_id": str,
            "start_timestamp": str,
            "stop_timestamp": str,
            "narration": str,
        },
        per_group(_epic_name, _epic, _epic_seen),
        licence="CC BY-NC 4.0",
        notes="Four corrupt clips are left out.",
    ),
    manual(
        "video_localized_narratives_caption",
        "video, captions of actors",
        "videos of OOPS, Kinetics-700, UVO and OVIS from their sites; the captions are fetched from the hub",
        Table("hf_dataset/*.arrow", repo="allenai/Molmo2-VideoLocalizedNarrativesCaptionHf"),
        "<video>, as the rows name it: oops/oops_video/train/..., kinetics/kinetics700/train/..., "
        "UVO/uvo_videos_{sparse,dense}/..., OVIS/train_mp4_5fps/...",
        {"id": CELL, "video": str, "captions": [str], "actor_names": [str]},
        per_row("id", _narrated, lambda rows: {"video": local(rows[0]["video"])}),
        licence=ODC,
        notes="The prompt names the actor.",
    ),
)
