"""Every kind that training counts, with made records, through shards, the real builder and the loader: the numbers are
counted by hand, on one rank and on two, and after a resume in the middle."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from molmo2_nemo.data.config import DataConfig, ImageConfig, PackingConfig, SourceConfig, VideoConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.reader import default_builder
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.tally import EXAMPLES, KINDS, SKIPPED, Tally
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from tests.support.films import film

from .test_build import png

FILM = film(120, fps=30, bframes=0)  # 4 s
QA = {"style": "user_qa", "question": "What is it?", "answer": "a cat"}
LONG = {"style": "user_qa", "question": "q", "answer": "word " * 2000}


def jpeg():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def pictures(count, *annotations):
    names = [f"{i}.png" for i in range(count)]
    data = {"images": names, "annotations": list(annotations) or [QA]}
    return {"json": json.dumps(data).encode(), **{name: png(30, 40, i) for i, name in enumerate(names)}}


def filmed(data=FILM, *annotations, **more):
    content = {"video": "mp4", "annotations": list(annotations) or [QA], **more}
    return {"json": json.dumps(content).encode(), "mp4": data}


def text(annotation):
    return {"json": json.dumps({"annotations": [annotation]}).encode()}


def tuned_in():
    """A broadcast that begins between key frames: the first sampled frame cannot be decoded."""
    data = film(120, "mpegts", gop=30)
    return data[len(data) // 5 // 188 * 188 :]


def track(times):
    points = [
        {"time": t, "points": {"0": {"point": [10, 10]}, "1": {"point": [9, 9], "occluded": t > 3}}} for t in times
    ]
    whole = {"style": "video_point_track_per_frame", "label": "x", "sampling_fps": 2, "points": points}
    return whole | {"width": 64, "height": 48}


SEVERAL = {"style": "multi_image_pointing", "label": "x", "point_scale": 100}
SUBTITLES = [
    {"start": 0.5, "end": 0.9, "text": "between the frames"},
    {"start": 0.0, "end": 0.2, "text": "at the first frame, and this is a long line of many words"},
]
TIMES = {"max_frames": 3}  # sampled at 0, 2 and 4 s
RECORDS = {
    "six-pictures": pictures(6, SEVERAL | {"points": [[[1, 2]], [], [], [], [], [[3, 4], [5, 6]]]}),
    "seven-pictures": pictures(7),
    "points-outside": pictures(
        1, {"style": "pointing", "label": "x", "points": [[-5, 50], [9, 9]], "point_scale": 100}
    ),
    "track": filmed(FILM, track([0, 0.5, 1, 1.5, 2, 3.5])),
    "many": pictures(1, *[QA] * 200),
    "long": text(LONG),
    "subtitles": filmed(subtitles=SUBTITLES),
    "short-sampling": filmed(sampling={"mode": "fps", "candidate_sampling_fps": [2]}),
    "own-sampling": filmed(sampling={"max_frames": 2}),
    "clip": filmed(clip=[3.0, 9.0]),
    "cut": {
        **pictures(1),
        "json": json.dumps({"images": ["0.jpg"], "annotations": [QA]}).encode(),
        "0.jpg": jpeg()[:-900],
    },
    "broadcast": {"json": json.dumps({"video": "ts", "annotations": [QA]}).encode(), "ts": tuned_in()},
    "good": pictures(1),
    "no-answer": text({"style": "user_qa", "question": "q", "answer": " "}),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    out = tmp_path_factory.mktemp("left_out")
    write_shards(out / "all", RECORDS.items(), records_per_shard=5)
    write_shards(out / "other", [("first", RECORDS["good"]), ("second", RECORDS["seven-pictures"])])
    return DataConfig(
        sources={"all": SourceConfig(str(out / "all")), "other": SourceConfig(str(out / "other"))},
        image=ImageConfig(crop_size=126, margin=2, max_crops=2, max_multi_image_crops=1),
        video=VideoConfig(max_frames=3, max_fps=1, subtitle_mode="frame_0.2", max_subtitle_tokens=8),
        packing=PackingConfig(sequence_length=512, max_crops=16, buffer_size=4),
        max_bad_share=1.0,
    )


@pytest.fixture(scope="module")
def by_hand(config):
    """Key -> kind -> count, of each record read once."""
    builder, _ = default_builder(config)
    tokenizer = Molmo2Tokenizer.load("tiny")
    whole = builder.plan(parse_record("s:long", RECORDS["long"]), np.random.default_rng(0))
    line = tokenizer.encode("subtitle\n0.0 - 0.2 at the first frame, and this is a long line of many words\n")
    thinned = {"films_thinned": 1}
    return {
        "six-pictures": {"ignored": 1, "points_ignored": 2},
        "seven-pictures": {"ignored": 2},
        "points-outside": {"points_moved": 1},
        "track": {"points_unseen": 2 * 3 + 1} | thinned,  # at 0.5, 1 and 1.5 s two, at 3.5 s one that is visible
        "long": {"tokens_cut": whole.num_tokens - 512},
        "subtitles": {"subtitles_unseen": 1, "subtitle_tokens_cut": len(line) - 8} | thinned,
        "short-sampling": {"films_cut": 1},
        "own-sampling": {},
        "clip": {"clips_cut": 1},
        "cut": {"truncated": 1},
        "good": {},
        "second": {"ignored": 2},
        "first": {},
    }


def run(config, size, batches):
    """The states of all ranks after so many batches, and how often each key was in a pack, with its branches there."""
    states, kept = [], {}
    for rank in range(size):
        stream = PackStream(config, micro_batch_size=1, dp_rank=rank, dp_size=size)
        for _, batch in zip(range(batches), stream, strict=False):
            for i, key in enumerate(batch.keys[0]):
                branches = batch.branch_ids[0][batch.example_ids[0] == i].max() + 1
                kept.setdefault(key.split(":")[1], []).append(int(branches))
        states.append(json.loads(json.dumps(stream.state())))
    return states, kept


def tally_of(states):
    tally = Tally()
    for state in states:
        tally.update(Tally.of_state(state))
    return tally


@pytest.mark.parametrize("size, batches", [(1, 30), (2, 18)])
def test_every_kind_is_counted_with_its_first_record(config, by_hand, size, batches):
    states, kept = run(config, size, batches)
    tally = tally_of(states)
    read = {key: len(found) for key, found in kept.items()}
    for state in states:
        for key, *_ in state["packer"]["counted"]:
            name = key.split(":")[1]
            read[name] = read.get(name, 0) + 1
    assert set(RECORDS) - set(read) == {"no-answer"}
    for kind in set(KINDS) - {"branches_dropped", "replaced_frames", "places_left_empty", "truncated"}:
        expected = {"all": 0, "other": 0}
        for key, kinds in by_hand.items():
            expected["other" if key in ("first", "second") else "all"] += kinds.get(kind, 0) * read.get(key, 0)
        expected["all"] += {"films_thinned": read["broadcast"]}.get(kind, 0)
        found = {source: count.amount for source, count in tally.kinds().get(kind, {}).items()}
        assert found == {source: count for source, count in expected.items() if count}, kind
    dropped = tally.found["all", "branches_dropped"].amount
    waiting_many = sum(
        counts["branches_dropped"] for s in states for key, _, counts in s["packer"]["counted"] if "many" in key
    )
    assert dropped - waiting_many == sum(200 - branches for branches in kept["many"])
    assert tally.found["all", "truncated"].amount == len(kept["cut"])  # known when it is decoded
    assert tally.found["all", "replaced_frames"].amount == len(kept["broadcast"])
    assert tally.found["all", SKIPPED + "bad annotation"].first[1].endswith(":no-answer")
    for kind, key in (
        ("points_moved", "points-outside"),
        ("tokens_cut", "long"),
        ("clips_cut", "clip"),
        ("truncated", "cut"),
    ):
        assert tally.found["all", kind].first[1].endswith(f".tar:{key}"), kind
    assert tally.found["other", "ignored"].first[1] == "other-000000.tar:second"
    assert tally.totals()[EXAMPLES] == sum(read.values())


def test_a_resume_in_the_middle_keeps_the_counts(config):
    whole, _ = run(config, 1, 16)
    states, _ = run(config, 1, 7)
    again = PackStream(config, micro_batch_size=1, dp_rank=0, dp_size=1)
    again.load_states(states)
    for _, batch in zip(range(9), again, strict=False):
        state = batch.state
    assert json.loads(json.dumps(state)) == whole[0]


def test_the_table_has_every_kind_that_happened(config):
    states, _ = run(config, 1, 30)
    lines = tally_of(states).table(config)
    text = " ".join(" ".join(lines).split())
    for words in (
        "images after the first 5, left out (data.image.max_images=5)",
        "points in images that are left out",
        "tracked points at times without a sampled frame, left out (data.video.max_frames=3)",
        "annotations beyond a sequence, left out (data.packing.sequence_length=512)",
        "frames that cannot be decoded",
        "records skipped: bad annotation",
        "other, first other-000000.tar:second",
    ):
        assert words in text, words
    assert max(map(len, lines)) <= 80
