"""A user's own points and times from the line to the text and the frames that training shows: whichever way the film is
prepared, and whatever is wrong with the line."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest

from data_prep.download import Downloader
from data_prep.media import Resolver
from data_prep.noticed import REPEATS, SLOW
from data_prep.record_builder import Asked, BuildOptions, Built, build
from data_prep.shard_tools import Terms, look
from data_prep.sources.base import Place, Skip
from data_prep.sources.own import entry_sample
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig
from molmo2_nemo.data.points import parse
from molmo2_nemo.data.record import BadRecord, parse_record
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.read import read_video
from tests.support.films import film, numbers
from tests.support.source_rows import png

FPS, SECONDS, SIZE = 10, 5.0, (160, 120)


@pytest.fixture(scope="module")
def builder():
    image = ImageConfig(crop_size=126, margin=2, max_crops=1)
    return ExampleBuilder(DataConfig(image=image), Molmo2Tokenizer.load("tiny"))


@pytest.fixture(scope="module")
def resolver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    made = {
        "short.mp4": film(int(FPS * SECONDS), fps=FPS, size=SIZE, gop=10, bframes=0),
        "25.mp4": film(80, fps=25, gop=10, options={"sc_threshold": "0"}),
        "uneven.mkv": film(
            96, "matroska", ticks=[i * 33 + i % 7 * 3 for i in range(96)], timescale=1000, gop=15,
            options={"sc_threshold": "0"},
        ),
        "picture.png": png(*SIZE),
    }  # fmt: skip
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return Resolver((folder,), folder / "cache", Downloader(folder / "cache"))


TERMS = Terms(asked=Asked.MEANT)


def prepared(line, resolver, options=None):
    return build(entry_sample(copy.deepcopy(line), "k", Place("own.jsonl", 1)), resolver, options or BuildOptions())


def members_of(made):
    return {name: m if isinstance(m, bytes) else m.read_bytes() for name, m in made.members.items()}


# --- one answer, whichever way the film is prepared -------------------------------------------------------------------

WAYS = {
    "cut": BuildOptions(cut_clips=True),
    "lower": BuildOptions(video_height=60),
    "lower and cut": BuildOptions(cut_clips=True, video_height=60),
    "key frames": BuildOptions(gop=5),
    "slower": BuildOptions(video_fps=7),
}


def annotations(start, end, fps):
    """One of each kind, at times of the film inside [start, end]; points in pixels, percent, and with a size."""
    times = [i / fps for i in range(int(end * fps)) if start <= i / fps <= end]
    at = [start + 0.2, (start + end) / 2, end]
    frames = [{"time": t, "points": {"a": {"point": [100 + 2 * i % 40, 80]}}} for i, t in enumerate(times)]
    return [
        {"style": "video_point", "label": "e", "points": [[[80, 60]], [[159, 119]], [[1, 2], [3, 4]]],
         "timestamps": at},
        {"style": "video_point_count", "label": "eye", "timestamps": at[:1], "points": [[[50, 9]]], "point_scale": 100},
        {"style": "video_point_track_per_frame", "label": "dog", "points": frames, "sampling_fps": 1},
        {"style": "video_point_ground_start_end", "label": "cat", "points": frames, "width": 200, "height": 150},
        {"style": "video_single_point_track_per_frame", "label": "it", "points": frames,
         "either": [{"sampling_fps": 1}]},
        {"style": "video_clip_caption_start_end", "text": "It sits.", "start": at[0], "end": at[1]},
        {"style": "video_frame_caption_timestamp", "text": "It sits.", "time": at[1]},
    ]  # fmt: skip


@pytest.mark.parametrize("sampling", [{}, {"mode": "fps", "sampling_fps": 2}])
@pytest.mark.parametrize("clip", [None, [0.7, 2.7], [1.1, 2.6], [1.0, 3.4]])
@pytest.mark.parametrize("name, fps", [("25.mp4", 25), ("uneven.mkv", 28.5)])
def test_text_and_frames_do_not_depend_on_how_a_film_is_prepared(name, fps, clip, sampling, builder, resolver):
    start, end = clip or [0.0, 3.0]
    lines = [{"start": start + 0.5, "end": start + 1, "text": "meow"}, {"start": 2, "end": 9, "text": "end"}]
    line = {
        "video": name,
        "annotations": annotations(start, min(end, 3.1), fps),
        "sampling": sampling,
        "subtitles": lines,
    }
    line |= {"clip": clip} if clip else {}
    shown = {}
    for way, options in {"plain": BuildOptions(), **WAYS}.items():
        made = prepared(line, resolver, options)
        assert isinstance(made, Built), made
        content = members_of(made)
        look("s:k", content, TERMS)
        record = parse_record("s:k", content)
        texts = [builder.plan(record, np.random.default_rng(seed)).info["conversations"] for seed in range(2)]
        video = read_video(record.video, builder.config.video, side=112, clip=record.clip, sampling=record.sampling)
        told = [(round(line.start, 3), round(line.end, 3), line.text) for line in record.subtitles]
        slower = (
            {REPEATS, SLOW} if options.video_fps else set()
        )  # the film as stored may have fewer frames than asked for
        shown[way] = (
            texts,
            [f"{t:.1f}" for t in video.times],
            numbers(video.frames),
            told,
            sorted({*made.notes} - slower),
        )
        same = (0, 1, 3, 4) if options.video_fps else range(5)  # other frames are there to choose from
        assert [shown[way][i] for i in same] == [shown["plain"][i] for i in same], way
    assert len(shown["plain"][0][0]) == 7 and len(shown["plain"][1]) >= 3


# --- what prepare calls good, training shows as it was meant, and the other way round ---------------------------------

MUTANTS = 1200
QA = {"style": "video_short_answer", "question": "q", "answer": "a"}
MARK = {"style": "user_qa", "question": "q", "answer": "<|POINT|>",
        "answer_annotations": [{"points": [[50, 40]], "inline_text": "x"}]}  # fmt: skip
FRAMES = [{"time": 1.2 + i / FPS, "points": {"a": {"point": [20 + i, 30]}, "b": {"point": [50, 60], "occluded": i < 9}}}
          for i in range(25)]  # fmt: skip
PER_FRAME = "video_point_track_per_frame"
KINDS = [
    {"style": "video_point", "label": "x", "timestamps": [1.5, 2.0, 3.5], "points": [[[1, 2]], [], [[3, 4], [5, 6]]]},
    {"style": "video_point", "label": "x", "timestamps": [2.0], "points": [[[50, 60]]], "point_scale": 100},
    {"style": "video_clip_caption_start_end", "text": "x", "start": 1.5, "end": 3.0},
    {"style": "video_frame_caption_timestamp", "text": "x", "time": 2.25},
    {"style": PER_FRAME, "label": "x", "points": FRAMES},
    {"style": PER_FRAME, "label": "x", "points": FRAMES[3:5], "sampling_fps": 1},
    {"style": "video_point_ground_start_end", "label": "x", "points": FRAMES[:6], "width": 160, "height": 120},
]
TIMES = ("time", "start", "end")


def holders(value, wanted):
    """(holder, name) of every time, or of every coordinate, below."""
    for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        below = value[name]
        if isinstance(below, (int, float)) and not isinstance(below, bool):
            point = isinstance(value, list) and len(value) == 2 and isinstance(name, int)
            if wanted == ("point" if point else "time") and (point or name in TIMES):
                yield value, name
        elif name == "timestamps":
            yield from ((below, i) for i in range(len(below)) if wanted == "time")
        else:
            yield from holders(below, wanted)


def mutated(rng):
    """A good line of one kind with up to two numbers, frames or settings changed."""
    entry = copy.deepcopy(KINDS[rng.integers(len(KINDS))])
    line = {"video": "short.mp4", "annotations": [entry, QA]}
    if rng.random() < 0.15:
        line = {"image": "picture.png", "annotations": [entry := copy.deepcopy(MARK)]}
    elif rng.random() < 0.6:
        line["clip"] = [1.0, 4.0]
    if "video" in line and rng.random() < 0.3:
        line["subtitles"] = [{"start": 0.5, "end": 1.5, "text": "u"}, {"start": 2.5, "end": 4.5, "text": "v"}]
    for _ in range(rng.integers(0, 3)):
        change, choices = rng.integers(6), list(holders({n: v for n, v in line.items() if n != "clip"}, "time"))
        if change < 2 and choices:
            holder, name = choices[rng.integers(len(choices))]
            holder[name] = float(
                rng.choice([rng.uniform(-1, 7), rng.uniform(0.7, 1.2), rng.uniform(3.8, 5.3), 1000 * rng.random()])
            )
        elif change == 2:
            points = list(holders({"annotations": line["annotations"]}, "point"))
            if points:
                holder, name = points[rng.integers(len(points))]
                holder[name] = float(rng.choice([rng.uniform(-3, 3), rng.uniform(95, 170), 999 * rng.random()]))
        elif change == 3 and "clip" in line:
            start, length = rng.uniform(-0.2, 5.5), rng.uniform(0.6, 6.0)  # of at least three frames
            line["clip"] = [start, start + length * rng.choice([1, 1, -1])]
        elif change == 4 and entry.get("points"):
            groups = entry["points"]
            del groups[rng.integers(len(groups)) :]
            entry |= {"timestamps": entry["timestamps"][: len(groups)]} if "timestamps" in entry else {}
            groups += groups[-1:] if rng.random() < 0.3 and "timestamps" not in entry else []
        elif change == 5 and "label" in entry:
            settings = [("point_scale", 1000), ("width", 0)]
            if "timestamps" not in entry:
                settings += [("sampling_fps", 2), ("sampling_fps", 3), ("snap", 0.03)]
            name, value = settings[rng.integers(len(settings))]
            entry[name] = value
    return line


def shown_track(entry, length, start):
    """By brute force: {shown time: {object: point}} of the visible points of a track, and whether any is answered."""
    snap, fps = entry.get("snap", 0.25), entry.get("sampling_fps", 2)
    marks = [*np.arange(0, length, 0.5), length]
    times = sorted({min(max(f["time"] - start, 0), length) for f in entry["points"]})
    taken, answer, mine = {}, {}, {mark: [] for mark in marks}
    for t in times:
        mine[min(marks, key=lambda m: (round(abs(t - m), 9), m))].append(t)
    for mark in marks:
        best = min(mine[mark], key=lambda t: (round(abs(t - mark), 9), t), default=None)
        if best is not None and abs(best - mark) <= max(snap, 0.01):
            taken[mark] = best
    if entry["style"] == PER_FRAME:
        at_rate = [m for m in marks if abs(m * fps - round(m * fps)) / fps <= 0.01]
        free = [t for t in mine[marks[-1]] if abs(t - marks[-2]) <= max(snap, 0.01)] if snap else []
        if marks[-1] not in at_rate and marks[-2] in at_rate and marks[-2] not in taken and free:
            taken[marks[-2]] = free[0]  # the end is in no answer
        taken = {mark: best for mark, best in taken.items() if mark in at_rate}
    for mark, best in taken.items():
        for f in entry["points"]:
            if min(max(f["time"] - start, 0), length) == best:
                visible = {n: p["point"] for n, p in f["points"].items() if not p.get("occluded")}
                answer.setdefault(mark, {}).update(visible)
    return {mark: found for mark, found in answer.items() if found}


def faults(line):
    """The rules of docs/data.md, once more: what is wrong with a line."""
    found = []
    start, end = line.get("clip", (0.0, SECONDS))
    if not (0 <= start < end <= SECONDS + 1 and start < SECONDS):
        return ["clip"]
    end = min(end, SECONDS)
    entry = line["annotations"][0]

    def time(t):
        if not start - 1 / FPS <= t <= end + 1 / FPS:
            found.append("time")
        return min(max(t, start), end)

    def point(xy):
        percent = entry.get("point_scale")
        unit = (percent, percent) if percent else (entry.get("width", SIZE[0]), entry.get("height", SIZE[1]))
        if any(not -0.01 <= v / side <= 1.01 for v, side in zip(xy, unit, strict=True)):
            found.append("point")

    for text in line.get("subtitles", ()):
        if not 0 <= text["start"] <= text["end"] or text["start"] > SECONDS + 1 / FPS:
            found.append("subtitles")
    if "label" in entry and entry.get("width") == 0:
        return ["width"]
    for inline in entry.get("answer_annotations", ()):
        found += ["inline" for xy in inline["points"] if not -1 <= min(xy) <= max(xy) <= 101]
    if "timestamps" in entry:
        for t, group in zip(entry["timestamps"], entry["points"], strict=True):
            time(t)
            for xy in group:
                point(xy)
    elif "text" in entry:
        times = [time(entry[name]) for name in TIMES if name in entry]
        if len(times) == 2 and not entry["start"] < entry["end"]:
            found.append("end")
        elif len(times) == 2 and times[0] == times[1]:
            found.append("end")
    elif "points" in entry:
        seen = set()
        for f in entry["points"]:
            for name, tracked in f["points"].items():
                if (time(f["time"]), name) in seen:
                    found.append("twice")
                seen.add((time(f["time"]), name))
                if not tracked.get("occluded"):
                    point(tracked["point"])
        if entry["style"] == PER_FRAME and entry.get("sampling_fps") == 3 and end - start > 0.5:
            found.append("rate")
        if entry["points"] and not found and not shown_track(entry, end - start, start):
            found.append("nothing shown")
    return found


def expected_times(line):
    """The times in the answer of the first annotation."""
    start, end = line.get("clip", (0.0, SECONDS))
    entry, end = line["annotations"][0], min(end, SECONDS)
    if "timestamps" in entry:
        groups = zip(entry["timestamps"], entry["points"], strict=True)
        times = sorted(min(max(t, start), end) - start for t, group in groups if group)
        return [round(t + 0, 1) for t in times]
    if entry["style"] == PER_FRAME:
        return [round(t, 1) for t in shown_track(entry, end - start, start)]
    return None


def test_what_is_called_good_is_shown_as_it_was_meant_and_the_other_way_round(builder, resolver):
    """Oracle: the rules written down a second time, by brute force, and the builder of training."""
    rng = np.random.default_rng(15)
    counts = {"good": 0, "refused": 0}
    kinds = set()
    for _ in range(MUTANTS):
        line = mutated(rng)
        wrong = faults(line)
        made = prepared(line, resolver)
        counts["refused" if wrong else "good"] += 1
        kinds.update(wrong)
        if wrong:
            assert isinstance(made, Skip) and made.fault is not None and made.fault.expected, (wrong, line)
            continue
        assert isinstance(made, Built), (made, line)
        content = members_of(made)
        look("s:k", content, TERMS)
        record = parse_record("s:k", content)
        for seed in range(3):
            texts = builder.plan(record, np.random.default_rng(seed)).info["conversations"]
            answers = [answer for turns in texts for _, answer in turns if answer not in ("a", "x")]
            times = [float(group.frame) for answer in answers for tag in parse(answer) for group in tag.groups]
            expected = expected_times(line)
            assert expected is None or np.allclose(times, expected, atol=1e-9), line
    assert min(counts.values()) > MUTANTS // 6, counts
    assert kinds >= {"clip", "time", "point", "subtitles", "end", "twice", "rate", "nothing shown", "inline", "width"}


def test_a_stored_record_is_judged_as_a_line_is(resolver):
    """Foreign tars and old shards: the clip's own times, nothing mended; the same line as a record without a clip."""
    rng = np.random.default_rng(16)
    counts = {True: 0, False: 0}
    for _ in range(MUTANTS // 2):
        line = mutated(rng)
        line.pop("clip", None)
        name = line.pop("video", None) or line.pop("image")
        suffix = name.rpartition(".")[2]
        data = {**line, **({"video": suffix} if suffix == "mp4" else {"images": ["0.png"]})}
        media = (resolver.folders[0] / name).read_bytes()
        wrong = faults(line)
        entry = line["annotations"][0]
        times = entry.get("timestamps", [])
        if times != sorted(times):
            wrong.append("order")  # a line is sorted
        if "points" in entry and "timestamps" not in entry:
            entry["snap"] = entry.get("snap", 0.25)  # a line gets it
        try:
            look("s:k", {suffix if suffix == "mp4" else "0.png": media, "json": json.dumps(data).encode()},
                 TERMS)  # fmt: skip
            good = True
        except BadRecord as error:
            good = False
            assert error.fault is not None and re.match(r"annotations\[0\]|subtitles\[", error.fault.field), error
        assert good is not bool(wrong), (wrong, data)
        counts[good] += 1
    assert min(counts.values()) > MUTANTS // 12, counts
