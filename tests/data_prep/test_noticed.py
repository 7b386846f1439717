"""prepare, check and index count what training will use in part only, in training's words, with each first key."""

import json

import pytest

from data_prep.noticed import Notes, note_lines
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import DataConfig, SourceConfig
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.reader import ExampleReader, Skipped, default_builder
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.tally import KINDS, counted
from tests.support.films import film
from tests.support.source_rows import png

QA = {"style": "user_qa", "question": "What is it?", "answer": "a cat"}
SIX = [f"{i}.png" for i in range(6)]
SCALED = {"label": "x", "point_scale": 100}
POINTS = {"style": "multi_image_pointing", **SCALED, "points": [[[1, 2]], [], [], [], [], [[3, 4]]]}
OUTSIDE = {"style": "pointing", **SCALED, "points": [[100.9, 5]]}
FORMS = {"style": "user_qa", "question": "q", "either": [{"answer": "a"}, {"answer": "word " * 20_000}]}
SAID = [{"start": 30.0, "end": 30.2, "text": "hello"}]
LONG_FILM = {"video": "long.mp4", "question": "q", "answer": "a"}
LINES = [
    {"key": "good", "image": "0.png", "caption": "x"},
    {"key": "six", "images": SIX, "annotations": [POINTS]},
    {"key": "six-again", "images": SIX, "caption": "x"},
    {"key": "outside", "image": "0.png", "annotations": [QA, OUTSIDE]},
    {"key": "branches", "image": "0.png", "annotations": [{**QA, "answer": "word " * 2000}] * 9},
    {"key": "text", "image": "0.png", "annotations": [{**QA, "answer": "word " * 20_000}]},
    {"key": "either", "image": "0.png", "annotations": [FORMS]},
    {"key": "film", **LONG_FILM},
    {"key": "own-frames", **LONG_FILM, "sampling": {"max_frames": 4}},
    {"key": "end", **LONG_FILM, "sampling": {"mode": "fps", "candidate_sampling_fps": [2, 4]}},
    {"key": "subtitles", **LONG_FILM, "subtitles": SAID, "sampling": {"max_frames": 2}},
    {"key": "bad", "image": "0.png", "caption": " "},
]
EXPECTED = {
    "ignored": (2, "six"),
    "points_ignored": (1, "six"),
    "branches_dropped": (1, "branches"),
    "tokens_cut": (3, "branches"),
    "films_thinned": (1, "film"),
    "films_cut": (1, "end"),
    "subtitles_unseen": (1, "subtitles"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noticed")
    for i, name in enumerate(SIX):
        (folder / name).write_bytes(png(30 + i, 20))
    (folder / "long.mp4").write_bytes(film(280, fps=4, size=(32, 32), gop=8))  # 70 s
    (folder / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


@pytest.fixture(scope="module")
def made(folder):
    """What prepare printed, and the data set."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["prepare", str(folder / "my.jsonl"), "--out", str(folder / "out"), "--workers", "0"]) == 0
    return said.getvalue(), folder / "out" / "my"


def texts(config, estimated=("branches_dropped", "tokens_cut")):
    """Text -> kind, of every kind."""
    return {kind.said(config) + (", by estimate" if name in estimated else ""): name for name, kind in KINDS.items()}


def noted(head, config=None):
    """Kind -> (records, first key)."""
    known = texts(config or DataConfig())
    return {known[text]: (count, first) for text, (count, first) in head["notes"].items() if text in known}


def test_prepare_counts_each_kind_with_the_first_key(made):
    said, out = made
    assert noted(read_head(out / MANIFEST)) == EXPECTED
    assert "used, but not as they are, or not in full (records):" in said
    for text, kind in texts(DataConfig()).items():
        if kind in EXPECTED:
            count, first = EXPECTED[kind]
            assert f"{count:>10,}  {text} (the first: {first})" in said
    assert "moved to its edge (the first: outside)" in said and "image.max_images=5" in said


def test_check_says_the_same_words(made, capsys):
    _, out = made
    assert main(["shards", "check", str(out), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    for text, kind in texts(DataConfig()).items():
        if kind in EXPECTED:
            count, first = EXPECTED[kind]
            assert f"{count:>10,}  {text} (the first: my-000000.tar:{first})" in said
    assert main(["shards", "check", str(out), "--workers", "0", "--json"]) == 0
    notes = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {note["reason"] for note in notes} == {"note"} and all(note["folder"] == str(out) for note in notes)
    found = {note["detail"]: (note["records"], note["key"].partition(":")[2]) for note in notes}
    assert noted({"notes": found}) == EXPECTED | {"points_moved": (1, "outside")}


def test_limits_are_those_of_the_run_asked_for(made, capsys):
    _, out = made
    more = ["data.image.max_images=6", "data.video.max_frames=384", "data.packing.sequence_length=400000"]
    more += ["data.packing.max_crops=400"]
    assert main(["shards", "check", str(out), "--workers", "0", "--for", *more]) == 0
    said = capsys.readouterr().out
    for kind in ("ignored", "points_ignored", "branches_dropped", "tokens_cut", "films_thinned", "films_cut"):
        assert KINDS[kind].words.partition(" {}")[0] not in said, kind


def test_check_adds_up_over_shards_and_workers(made, tmp_path, capsys):
    """Three shards, looked at by two processes: the counts are the sums, the first key that of the first shard."""
    one = {"json": json.dumps({"images": SIX, "annotations": [QA]}).encode()} | {name: png(30, 20) for name in SIX}
    write_shards(tmp_path / "set", [(f"k{i}", one) for i in range(5)], records_per_shard=2)
    printed = []
    for workers in ("0", "2"):
        assert main(["shards", "check", str(tmp_path / "set"), "--workers", workers]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and " 5  images after the first 5" in printed[0]
    assert "(the first: set-000000.tar:k0)" in printed[0]


def test_index_keeps_them_in_the_manifest(tmp_path, capsys):
    one = {"json": json.dumps({"images": SIX, "annotations": [QA]}).encode()} | {name: png(30, 20) for name in SIX}
    write_shards(tmp_path / "set", [("a", {"json": json.dumps({"annotations": [QA]}).encode()}), ("k", one)])
    (tmp_path / "set" / MANIFEST).unlink()
    assert main(["shards", "index", str(tmp_path / "set")]) == 0
    text = KINDS["ignored"].said(DataConfig())
    assert read_head(tmp_path / "set" / MANIFEST)["notes"] == {text: [1, "set-000000.tar:k"]}
    assert f" 1  {text} (the first: set-000000.tar:k)" in capsys.readouterr().out


def test_training_counts_what_prepare_said(made):
    """The real builder with the same settings: the records noted are those of which training counts something."""
    _, out = made
    config = DataConfig(sources={"my": SourceConfig(str(out))})
    builder, im_patch = default_builder(config)
    reader = ExampleReader(config, builder, im_patch)
    found = {}
    for n in range(len(reader.datasets["my"])):
        example = reader.plan(n)
        assert not isinstance(example, Skipped), example
        for kind in counted(example.info):
            found.setdefault(kind, set()).add(example.key.split(":")[1])
    assert found["ignored"] == {"six", "six-again"} and found["points_ignored"] == {"six"}
    assert found["points_moved"] == {"outside"} and found["films_thinned"] == {"film"} and found["films_cut"] == {"end"}
    assert found["subtitles_unseen"] == {"subtitles"} and "text" in found["tokens_cut"]
    assert found["branches_dropped"] == {"branches"}


def test_notes_add_up():
    notes = Notes()
    notes.add(["a", "b"], "k1")
    notes.add(["b"], "k2")
    later = Notes()
    later.add(["b", "c"], "k3")
    notes.update(later.found)
    assert notes.json() == {"a": [1, "k1"], "b": [3, "k1"], "c": [1, "k3"]}
    assert note_lines({}) == [] and note_lines(notes.json())[1:] == [
        f"  {count:>10,}  {text} (the first: {first})" for text, (count, first) in notes.json().items()
    ]
