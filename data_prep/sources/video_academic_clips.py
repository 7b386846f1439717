"""Academic sets of questions about parts of videos: one record per part, with its questions as branches."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from data_prep.sources.base import Context, Cut, File, FirstOf, Frames, Row, Sample, Skip, Source, Table, maybe, number
from data_prep.sources.shapes import choice, qa, shuffled_choice
from data_prep.sources.shapes_video import (
    CELL,
    CHOICE,
    CHOSEN,
    CORRUPT,
    EMPTY_CLIP,
    ODC,
    SHORT,
    Branches,
    chosen,
    clip_name,
    cut_lines,
    manual,
    open_ended,
    per_group,
    per_row,
    pick,
    seconds,
    span,
    text,
)
from molmo2_nemo.data.templates import NOT_SURE, PAXION_QUESTIONS

if TYPE_CHECKING:
    import numpy as np

# --- TVQA: frames of TV series at 3 per second, with subtitles -------------------------------------------------------

TVQA_REPO = "allenai/Molmo2-TVQA"
TVQA_SUBTITLES = Table("tvqa_preprocessed_subtitles.jsonl", repo=TVQA_REPO)
TVQA_FPS = 3
TVQA_FOLDERS = {
    "Grey's Anatomy": "grey_frames",
    "How I Met You Mother": "met_frames",  # as the data set spells it
    "The Big Bang Theory": "bbt_frames",
    "House M.D.": "house_frames",
    "Castle": "castle_frames",
    "Friends": "friends_frames",
}
TVQA_CORRUPT = frozenset({"grey_s03e15_seg02_clip_05/00001_00051", "castle_s08e08_seg02_clip_14/00001_00019"})


def tvqa_frames(row: Row) -> tuple[int, int] | None:
    """Numbers of the first and last frame (from 1) of a row's time span; None if it has none."""
    start, end = _tvqa_span(row)
    if start is None or end is None:
        return None
    return int(start * TVQA_FPS) + 1, int(end * TVQA_FPS)


def _tvqa_span(row: Row) -> tuple[float | None, float | None]:
    begins, _, ends = row["ts"].partition("-")
    return seconds(begins), seconds(ends)


def _tvqa_key(row: Row) -> str:
    first, last = tvqa_frames(row) or (0, 0)
    return f"{row['vid_name']}/{first:05d}_{last:05d}"


def _tvqa_seen(row: Row) -> dict[str, Any]:
    first, last = tvqa_frames(row) or (0, 0)
    folder = f"{TVQA_FOLDERS[row['show_name']]}/{row['vid_name']}"
    made = f"{folder}/video_{first:05d}_{last:05d}"
    frames = Frames(f"frames_hq/{folder}", TVQA_FPS, first - 1, last - 1)
    return {"video": FirstOf(File(f"frames_hq/{made}", f"video-frames/frames_hq/{made}"), frames)}


def _tvqa(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    """Branches with subtitles where a row's time span has any; all branches share those of the last such row."""
    said = {row["vid_name"]: json.dumps(row["sub"]) for row in ctx.rows(TVQA_SUBTITLES)}  # text is smaller than objects

    def lines(row: Row) -> list[tuple[float, float, str]]:
        start, end = _tvqa_span(row)
        found = json.loads(said.get(row["vid_name"], "[]"))
        return cut_lines(row["vid_name"], found if isinstance(found, list) else [], start or 0.0, end or 0.0)

    def branches(row: Row, rng: np.random.Generator) -> Branches:
        frames = tvqa_frames(row)
        if frames is None or frames[1] < frames[0]:
            return EMPTY_CLIP
        if row["show_name"] not in TVQA_FOLDERS:
            return "unknown show"
        if _tvqa_key(row) in TVQA_CORRUPT:
            return CORRUPT
        made = chosen(row["q"], [row[f"a{i}"] for i in range(5)], row["answer_idx"])
        if isinstance(made, str):
            return made
        return [{**made, "style": f"{CHOICE}_w_subtitle"} if lines(row) else made]

    def visual(group: list[Row]) -> dict[str, Any]:
        heard = [found for found in map(lines, group) if found]
        return {**_tvqa_seen(group[0]), "subtitles": heard[-1] if heard else ()}

    yield from per_group(_tvqa_key, branches, visual)(rows, ctx)


# --- Paxion: an action or its antonym --------------------------------------------------------------------------------

PAXION_REPO = "allenai/Molmo2-Paxion"
PAXION_CORRUPT = frozenset({"703d550a-0a84-4bcf-9b45-e25c864ade70"})
PAXION_CORRUPT_CLIPS = frozenset({"1348c9f9-fc8b-40c7-b1ab-5b6281e5d390_978.617_979.098"})


def clean_label(label: str) -> str:
    """A narration without its leading mark (`#C`), with a capital letter."""
    if label.startswith("#") and len(label) > 1 and not label[1].isspace():
        label = label[2:].lstrip()
    return label[:1].upper() + label[1:]


def _paxion_key(row: Row) -> str:
    if row.get("rel_vid_path"):
        return f"ssv2/{row['rel_vid_path']}"
    return "ego4d/" + clip_name(text(row.get("video_uid")), row.get("clip_start") or 0.0, row.get("clip_end") or 0.0, 3)


def _paxion(row: Row, rng: np.random.Generator) -> Branches:
    if row.get("rel_vid_path"):
        right, wrong = text(row.get("label")), text(row.get("label_action_antonym_clip_text"))
    elif row.get("video_uid") and row.get("clip_start") is not None and row.get("clip_end") is not None:
        if row["clip_start"] >= row["clip_end"]:
            return EMPTY_CLIP
        if row["video_uid"] in PAXION_CORRUPT or _paxion_key(row).removeprefix("ego4d/") in PAXION_CORRUPT_CLIPS:
            return CORRUPT
        right, wrong = clean_label(text(row.get("clip_text"))), clean_label(text(row.get("action_antonym_clip_text")))
    else:
        return "neither Something-Something nor Ego4D"
    if not right or not wrong:
        return "no label or no antonym"
    options = [[right, wrong, NOT_SURE][i] for i in rng.permutation(3)]
    return [choice(pick(rng, PAXION_QUESTIONS), options, options.index(right), CHOICE)]


def _paxion_seen(rows: list[Row]) -> dict[str, Any]:
    row = rows[0]
    if row.get("rel_vid_path"):
        return {"video": File(f"sth-sth-v2/videos/{row['rel_vid_path']}")}
    start, end = float(row["clip_start"]), float(row["clip_end"])
    cut = File(f"paxion-ego4d-clips/{clip_name(row['video_uid'], start, end, 3)}")
    return {"video": FirstOf(cut, Cut(ego4d_video(row["video_uid"]), start, end))}


def ego4d_video(uid: str) -> File:
    """A whole Ego4D video, in the layout of its own downloader."""
    return File(f"Ego4d/ego4d_data/v2/full_scale/{uid}", f"v2/full_scale/{uid}", f"full_scale/{uid}")


# --- How2QA ----------------------------------------------------------------------------------------------------------

HOW2QA_COLUMNS = ("video", "span", "wrong1", "wrong2", "wrong3", "question", "answer")
HOW2QA_CORRUPT = frozenset({"Z1NEMNKgR9U", "onGTfd-EKrs_89.15_89.44", "bkl7eK8B6ig_147.73_149.83"})  # videos and clips


def _how2qa_key(row: Row) -> str:
    start, end = span(row["span"]) or (0.0, 0.0)
    return f"{row['video']}_{round(start, 2)}_{round(end, 2)}"


def _how2qa(row: Row, rng: np.random.Generator) -> Branches:
    found = span(row["span"])
    if found is None or found[0] >= found[1]:
        return EMPTY_CLIP
    if row["video"] in HOW2QA_CORRUPT or _how2qa_key(row) in HOW2QA_CORRUPT:
        return CORRUPT
    wrong = [text(row[f"wrong{i}"]) for i in (1, 2, 3)]
    return [shuffled_choice(text(row["question"]), text(row["answer"]), wrong, rng)]


def _how2qa_seen(rows: list[Row]) -> dict[str, Any]:
    start, end = span(rows[0]["span"]) or (0.0, 0.0)
    names = dict.fromkeys((_how2qa_key(rows[0]), _how2qa_published(rows[0])))
    clip = File(*(f"video-clips/{name}" for name in names))
    return {"video": FirstOf(clip, Cut(File(f"videos/{rows[0]['video']}"), round(start, 2), round(end, 2)))}


def _how2qa_published(row: Row) -> str:
    """The name of a clip in the published code: `v_0_5.2` where the times are written `[0:5.2]`."""
    times = re.findall(r"\d+(?:\.\d+)?", row["span"])
    return "_".join([row["video"], *(str(round(float(t), 2) if "." in t else int(t)) for t in times)])


# --- STAR ------------------------------------------------------------------------------------------------------------


def _star(row: Row, rng: np.random.Generator) -> Branches:
    """Every question both open and as multiple choice; the correct option is the last one whose text matches."""
    start, end = seconds(row["start"]), seconds(row["end"])
    if start is None or end is None or start >= end:
        return EMPTY_CLIP
    options = [option["choice"] for option in row["choices"]]
    places = [i for i, option in enumerate(options) if option == row["answer"]]
    right = chosen(row["question"], options, places[-1] if places else None)
    return [open_ended(row["question"], row["answer"]), right]


def _star_seen(rows: list[Row]) -> dict[str, Any]:
    name = rows[0]["video_id"]
    return {
        "video": File(f"Charades_v1/{name}", f"Charades/Charades_v1/{name}"),
        "clip": (float(rows[0]["start"]), float(rows[0]["end"])),
    }


# --- QVHighlights ----------------------------------------------------------------------------------------------------

MAX_WINDOWS = 5


def _highlights(row: Row, rng: np.random.Generator) -> Branches:
    windows = row["relevant_windows"]
    if len(windows) > MAX_WINDOWS:
        return f"more than {MAX_WINDOWS} windows"
    if not windows:
        return "no window"
    query = row["query"].rstrip(".")
    question = f"Query: {query}. Which segments of the video does it describe? Give start and end in seconds."
    return [qa(question, "Segments: " + ", ".join(f"[{text(a)}-{text(b)}]" for a, b in windows), SHORT)]


def _highlights_seen(rows: list[Row]) -> dict[str, Any]:
    return {"video": File(f"videos/{rows[0]['vid']}")}


SOURCES: tuple[Source, ...] = (
    manual(
        "tvqa_with_sub",
        "video with subtitles, multiple choice",
        "frames at 3 per second (frames_hq) from the TVQA site, after signing its form; the rest comes from the hub",
        Table("tvqa_train.jsonl", repo=TVQA_REPO),
        "frames_hq/{bbt,castle,friends,grey,house,met}_frames/<vid_name>/00001.jpg and so on",
        {
            "vid_name": str,
            "show_name": str,
            "ts": str,
            "q": str,
            "answer_idx": CELL,
            **{f"a{i}": CELL for i in range(5)},
        },
        _tvqa,
        licence=ODC,
        notes="A record is a span of frames. Subtitles that overlap it are counted from its start and cut at its ends "
        "(the published loader keeps negative times). Spans without frames count as missing media.",
    ),
    manual(
        "paxion",
        CHOSEN,
        "videos of Something-Something V2 and Ego4D (both need a form); the labels are fetched from the hub",
        (
            Table("ssv2/antonyms/train_with_rel_path.json", repo=PAXION_REPO),
            Table("ego4d/egoclip_subset_action_antonyms_train_val_test_split/train.jsonl", repo=PAXION_REPO),
        ),
        (
            "sth-sth-v2/videos/<rel_vid_path>",
            "paxion-ego4d-clips/<video_uid>_<start>_<end>.mp4 (times with 3 decimals) or "
            "Ego4d/ego4d_data/v2/full_scale/<video_uid>.mp4",
        ),
        {
            "rel_vid_path": maybe(str),
            "label": maybe(str),
            "label_action_antonym_clip_text": maybe(str),
            "video_uid": maybe(str),
            "clip_start": maybe(number),
            "clip_end": maybe(number),
            "clip_text": maybe(str),
            "action_antonym_clip_text": maybe(str),
        },
        per_group(_paxion_key, _paxion, _paxion_seen),
        licence=ODC,
        notes="Options are the label, its antonym and 'Not sure' in random order.",
    ),
    manual(
        "how2qa",
        CHOSEN,
        "How2 videos by YouTube id; the questions are fetched from https://github.com/ych133/How2R-and-How2QA",
        Table(
            "how2QA_train_release.csv",
            header=HOW2QA_COLUMNS,
            url="https://raw.githubusercontent.com/ych133/How2R-and-How2QA/master/how2QA/how2QA_train_release.csv",
        ),
        "videos/<video>.mp4, or the clips cut out as video-clips/<video>_<start>_<end>.mp4",
        {"video": str, "span": str, **{name: CELL for name in HOW2QA_COLUMNS[2:]}},
        per_group(_how2qa_key, _how2qa, _how2qa_seen),
    ),
    manual(
        "star",
        "video clip, question and answer, multiple choice",
        "Charades_v1 videos (https://prior.allenai.org/projects/charades); the questions are fetched",
        Table(
            "STAR_train.json",
            url="https://star-benchmark.s3.us-east.cloud-object-storage.appdomain.cloud/"
            "Question_Answer_SituationGraph/STAR_train.json",
        ),
        "Charades_v1/<video_id>.mp4",
        {"video_id": str, "start": CELL, "end": CELL, "question": str, "answer": str, "choices": [{"choice": str}]},
        per_group(
            lambda row: f"{row['video_id']}_{seconds(row['start'])}_{seconds(row['end'])}",
            _star,
            _star_seen,
            at_most=10,
        ),
        licence="Apache 2.0 (questions); Charades is for non-commercial use",
        notes="At most 10 branches per record; more are split evenly.",
    ),
    manual(
        "qv_highlights",
        "video, moments",
        "qvhilights_videos.tar.gz from https://nlp.cs.unc.edu/data/jielei/qvh, unpacked; the queries are fetched",
        Table(
            "highlight_train_release.jsonl",
            url="https://raw.githubusercontent.com/jayleicn/moment_detr/refs/heads/main/data/"
            "highlight_train_release.jsonl",
        ),
        "videos/<vid>.mp4",
        {"qid": CELL, "vid": str, "query": str, "relevant_windows": [[number]]},
        per_row(lambda row: f"{text(row['qid'])}_{row['vid']}", _highlights, _highlights_seen),
        licence="CC BY-NC-SA 4.0",
        notes="Queries with more than 5 windows are left out; the wording of the question is our own.",
    ),
)
