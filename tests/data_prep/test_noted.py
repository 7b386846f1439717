"""What `molmo2 prepare` says of pictures and films: those that training changes are counted with the first key, those
that it cannot use are named among several, and a name's ending decides nothing."""

import io
import json
import re
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from data_prep import demo
from data_prep.media_kinds import MediaError
from data_prep.noticed import REPEATS, SLOW
from data_prep.output import Output
from data_prep.probe import probe_video
from data_prep.record_builder import Asked, Built
from data_prep.shard_tools import Terms, look
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.manifest import MANIFEST, Entry, read_entries, read_head
from molmo2_nemo.data.record import BadRecord
from molmo2_nemo.data.shards import ShardDataset
from tests.support.films import film


def saved(path, image, kind="PNG", **options):
    image.save(path, kind, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    clear = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    saved(tmp_path / "clear.png", clear)
    saved(tmp_path / "plain.png", Image.new("RGBA", (40, 30), (9, 9, 9, 255)))
    saved(
        tmp_path / "moving.gif",
        clear.convert("RGB"),
        "GIF",
        save_all=True,
        append_images=[Image.new("RGB", (40, 30), "red")],
    )
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)).save(file, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:-900])
    (tmp_path / "page.jpg").write_bytes(b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>")
    (tmp_path / "nothing.jpg").write_bytes(b"")
    saved(tmp_path / "really_png.jpg", Image.new("RGB", (40, 30), "blue"))
    (tmp_path / "film.jpg").write_bytes((demo.MEDIA / "bunny.mp4").read_bytes())
    (tmp_path / "film.avi").write_bytes((demo.MEDIA / "bunny.mp4").read_bytes())
    (tmp_path / "film.mov").write_bytes((demo.MEDIA / "bunny.mp4").read_bytes())
    (tmp_path / "picture.mp4").write_bytes((demo.MEDIA / "cat.jpg").read_bytes())
    (tmp_path / "page.mp4").write_bytes((tmp_path / "page.jpg").read_bytes())
    (tmp_path / "nothing.mp4").write_bytes(b"")
    return tmp_path


def prepare(folder, *lines, options=()):
    text = "".join(json.dumps({"caption": "x", "key": f"k{i}", **line}) + "\n" for i, line in enumerate(lines))
    (folder / "my.jsonl").write_text(text)
    status = main(["prepare", str(folder / "my.jsonl"), "--out", str(folder / "out"), "--workers", "0", *options])
    out = folder / "out" / "my"
    path = out / "skipped.jsonl"
    skipped = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return status, {line["key"]: f"{line['reason']}: {line['detail']}" for line in skipped}


def test_what_training_changes_is_counted_with_the_first_key(folder, capsys):
    pictures = ["plain.png", "clear.png", "moving.gif", "cut.jpg", "clear.png"]
    status, skipped = prepare(folder, *({"image": name} for name in pictures))
    assert status == 0 and not skipped
    shown = capsys.readouterr().out
    assert re.search(r" 2  an image partly transparent: .* \(the first: k1\)", shown)
    assert re.search(r" 1  an image of several frames .* \(the first: k2\)", shown)
    assert re.search(r" 1  an image cut off .* \(the first: k3\)", shown)
    noted = read_head(folder / "out" / "my" / MANIFEST)["notes"]
    assert sorted(noted.values()) == [[1, "k2"], [1, "k3"], [2, "k1"]]


def test_counts_survive_an_interruption(tmp_path):
    def write(out, *parts):
        for part in parts:
            with Output(out, {"a": 1}, records_per_shard=1) as output:
                if output.resume_at:
                    for n in range(output.resume_at):
                        output.seen(str(n))
                for n in range(output.resume_at, part):
                    notes = ("odd",) if n % 2 else ()
                    output.add(str(n), Built(f"k{n}", {"json": b"{}"}, Entry(""), notes))
                if part == 6:
                    return output.finish({"name": "x"})
        raise AssertionError

    whole, interrupted = write(tmp_path / "whole", 6), write(tmp_path / "again", 4, 6)
    assert whole["notes"] == interrupted["notes"] == {"odd": [3, "k1"]}


def test_bad_ones_are_named_and_told_by_their_content(folder):
    status, skipped = prepare(
        folder,
        {"images": ["plain.png", "page.jpg", "clear.png"]},
        {"image": "nothing.jpg"},
        {"image": "film.jpg"},
        {"video": "picture.mp4"},
        {"video": "page.mp4"},
        {"video": "nothing.mp4"},
        {"image": "really_png.jpg"},
        {"video": "film.avi"},
        {"video": "film.mov"},
    )
    assert status == 0 and len(skipped) == 6
    assert (
        skipped["k0"].startswith("image cannot be decoded: image 2 of 3, page.jpg: ") and "HTML page" in skipped["k0"]
    )
    assert skipped["k1"].startswith("image cannot be decoded: nothing.jpg: ") and "empty" in skipped["k1"]
    assert "film.jpg: " in skipped["k2"] and "a video (MP4 or its like): name it as video" in skipped["k2"]
    assert "picture.mp4: it is a picture (JPEG): name it as image" in skipped["k3"]
    assert "page.mp4: it is an HTML page" in skipped["k4"] and "nothing.mp4: it is empty" in skipped["k5"]
    entries = {e.key: [m.suffix for m in e.members] for e in next(iter(read_entries(folder / "out" / "my" / MANIFEST)))}
    assert entries == {"k6": ["0.png", "json"], "k7": ["json", "mp4"], "k8": ["json", "mov"]}


def test_inline_films_too():
    with pytest.raises(MediaError, match=r"it is a picture \(PNG\)"):
        file = io.BytesIO()
        Image.new("L", (4, 4)).save(file, "PNG")
        probe_video(file.getvalue(), "mp4")
    assert probe_video((demo.MEDIA / "bunny.mp4").read_bytes(), "webm").suffix == "mp4"


@pytest.fixture
def half(tmp_path):
    """half.mkv: 8 s, as its header says, of which about 4 are there."""
    data = film(240, "matroska")
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    (tmp_path / "whole.mkv").write_bytes(data)
    return tmp_path


TRACK = {"style": "video_point_track_per_frame", "label": "cat"}
POINT = {"style": "video_point", "label": "cat", "points": [[[9, 9]]]}
IN_THE_LOST_PART = {
    "clip": {"caption": "x", "clip": [5.0, 7.0]},
    "clip that begins in what is there": {"caption": "x", "clip": [1.0, 8.0]},
    "track": {"annotations": [{**TRACK, "points": [{"time": 7, "points": {"1": {"point": [9, 9]}}}]}]},
    "points": {"annotations": [{**POINT, "timestamps": [7.5]}]},
    "subtitles": {"caption": "x", "subtitles": [{"start": 6, "end": 7, "text": "t"}]},
}


@pytest.mark.parametrize("name", IN_THE_LOST_PART)
def test_a_time_in_the_lost_part_of_a_film_names_the_cut(half, name):
    line = IN_THE_LOST_PART[name]
    line = {"caption": None, **line}
    _, refused = prepare(half, {**line, "video": "half.mkv"}, {**line, "video": "whole.mkv"})
    assert list(refused) == ["k0"]
    assert re.search(r"header states 8(\.\d+)? s: it is cut off, download it again", refused["k0"]), refused
    _, refused = prepare(
        half, {"clip": [50.0, 70.0], "video": "half.mkv"}, {"video": "whole.mkv"}, options=("--overwrite",)
    )
    assert "header states" not in refused["k0"], "far behind both ends"


def test_stored_records_name_the_cut_too(half):
    lost = {"caption": None, "annotations": [{**POINT, "timestamps": [7.5]}]}
    prepare(
        half,
        {**lost, "video": "whole.mkv"},
        {**IN_THE_LOST_PART["clip"], "video": "whole.mkv"},
        {"video": "half.mkv"},
        {"clip": [1.0, 8.0], "video": "whole.mkv"},
    )
    found = {}
    for key, members in _members(half / "out" / "my").items():
        terms = Terms(asked=Asked.MEANT)
        with pytest.raises(BadRecord) if key != "k2" else nullcontext() as caught:
            look(key, {**members, "mkv": (half / "half.mkv").read_bytes()}, terms)
        found[key] = key == "k2" or "header states 8.0" in str(caught.value)
    assert found == {"k0": True, "k1": True, "k2": True, "k3": True}


def _members(folder):
    dataset = ShardDataset(folder, "my")
    read = (dataset.read(i) for i in range(len(dataset)))
    return {label.rpartition(":")[2]: members for label, members in read}


@pytest.mark.parametrize("sampling, said", [
    ({"mode": "fps", "sampling_fps": 99}, True),
    ({"mode": "fps", "candidate_sampling_fps": [60, 90]}, True),
    ({"max_fps": 100, "max_frames": 16}, False),  # 16 over the whole film
    ({"mode": "fps", "sampling_fps": 30}, False),
    ({"mode": "fps", "sampling_fps": 7}, False),
    ({"max_fps": 4}, False),
    ({}, False),
])  # fmt: skip
def test_more_frames_a_second_than_the_film_has_are_said(half, sampling, said):
    (half / "short.mp4").write_bytes(film(30))
    prepare(half, {"video": "short.mp4", "sampling": sampling})
    assert (REPEATS in read_head(half / "out" / "my" / MANIFEST).get("notes", {})) is said


@pytest.mark.parametrize("fps, sampling, said", [(1, {}, True), (2, {}, False), (1, {"max_fps": 1}, False)])
def test_films_slower_than_training_shows_are_said(half, fps, sampling, said):
    """Counted by hand: ten frames of 1 s are shown at 0, 0.5, 1, ... s, each twice; those of 0.5 s once."""
    (half / "slow.mp4").write_bytes(film(10, fps=fps))
    prepare(half, {"video": "slow.mp4", "sampling": sampling})
    assert (SLOW in read_head(half / "out" / "my" / MANIFEST).get("notes", {})) is said


@pytest.mark.parametrize("suffix, container, stored", [
    *((name, "mpeg", "mpg") for name in ("vob", "VOB", "mpg")),
    *((name, "mpegts", "ts") for name in ("m2ts", "mts", "ts")),
    ("asf", "asf", "wmv"), ("f4v", "mp4", "mp4"), ("3g2", "mp4", "mp4"),
])  # fmt: skip
def test_endings_of_films_that_training_reads(half, suffix, container, stored):
    (half / f"x.{suffix}").write_bytes(film(30, container, "mpeg4" if container == "asf" else "mpeg2video", fps=25))
    status, refused = prepare(half, {"video": f"x.{suffix}"})
    assert status == 0 and not refused
    (members,) = _members(half / "out" / "my").values()
    assert set(members) == {"json", stored}
