"""Cut and re-encoded films show the frames of the whole film, in the same order, at the same times."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from av.stream import Disposition

from data_prep.demo import MEDIA
from data_prep.download import Downloader
from data_prep.media import Resolver
from data_prep.media_kinds import MediaError
from data_prep.output import Output
from data_prep.prepare import Options
from data_prep.probe import probe_video
from data_prep.record_builder import SLOW_TO_READ, BuildOptions, Built, build
from data_prep.sources.base import File, Sample
from data_prep.sources.own import own_source
from data_prep.sources.shapes import qa
from data_prep.transcode import KEPT_WHOLE, MANY_REPLACED, REPLACED, Wanted, cut_packets, reencode
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import DataConfig, LimitsConfig, VideoConfig
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.video.read import read_video
from tests.support.films import display_matrix, film, numbers, remuxed


def in_decoding_order(number, packet):
    packet.pts = packet.dts = number * 512


FILMS = {
    "mp4": lambda: film(gop=30),
    "ts": lambda: film(90, "mpegts", gop=30),
    "turned": lambda: film(gop=30, size=(120, 160), matrix=display_matrix(0, 1, -1, 0)),
    "mirrored": lambda: film(gop=30, matrix=display_matrix(-1, 0, 0, 1)),
    "avi with B frames": lambda: film(90, "avi"),
    "scrambled": lambda: remuxed([film()], "mp4", in_decoding_order),
    "joined": lambda: film(60, "mpegts") + film(30, "mpegts", first=60),
    "default second": lambda: remuxed(
        [film(size=(240, 180), first=100), film()], "matroska", flags=[Disposition(0), Disposition.default]
    ),
    "variable rate": lambda: film(
        90, "matroska", ticks=[i * 33 + i % 7 * 3 for i in range(90)], timescale=1000, gop=30
    ),
}


def shown(video, clip, fps=4.0):
    """What its sampled frames show, with mirrored and turned films read the way that they are shown."""
    return read_video(video.content(), VideoConfig(max_frames=80, max_fps=fps), side=112, clip=clip)


@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.7, 2.1), (1.5, 9.0)])
@pytest.mark.parametrize("name", FILMS)
def test_one_order_of_frames(name, clip):
    """Decoded whole, with --cut-clips, with --video-height, with --gop: the same moments show the same frames."""
    whole = probe_video(FILMS[name](), None)
    before = shown(whole, clip)
    cut, moved = cut_packets(whole, clip)
    after = shown(cut, moved)
    assert np.array_equal(before.frames, after.frames) and before.duration == pytest.approx(after.duration, abs=1e-3)
    for wanted, part in ((Wanted(height=100), True), (Wanted(gop=5), False)):
        made, moved = reencode(whole, clip, wanted, cut=part)
        after = shown(made, moved)
        assert made is not whole and len(after.times) == len(before.times)
        assert np.abs(before.frames.astype(int) - after.frames)[:, ::8, ::8].mean() < 8
        if name not in ("turned", "mirrored"):
            assert numbers(after.frames) == numbers(before.frames)


INTRA_REFRESH = {"x264-params": "intra-refresh=1:keyint=24:bframes=0"}


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("clip", [(1.1, 2.7), (1.5, 1.9)])
def test_films_without_key_frames_to_cut_at_stay_whole_and_are_counted(container, clip):
    """With periodic intra refresh the first frames after a key frame, as FFmpeg calls it, cannot be decoded."""
    whole = probe_video(film(90, container, options=INTRA_REFRESH), None)
    cut, moved = cut_packets(whole, clip)
    before, after = shown(whole, clip), shown(cut, moved)
    assert numbers(before.frames)[0] == round(clip[0] * 30) and before.decoding.replaced == 0
    assert np.array_equal(before.frames, after.frames)
    assert cut.notes == (KEPT_WHOLE,) and cut.data is whole.data


def test_films_whose_frames_are_counted_stay_whole_and_are_counted():
    whole = probe_video(FILMS["scrambled"](), None)
    cut, moved = cut_packets(whole, (1.0, 1.5))
    assert cut.notes == (KEPT_WHOLE,) and cut.data is whole.data and moved == (1.0, 1.5)


def test_the_summary_counts_what_was_not_cut(resolver, tmp_path):
    (tmp_path / "x.mp4").write_bytes(film(90, options=INTRA_REFRESH))
    sample = Sample("s", [qa("q", "a")], video=File("x.mp4"), clip=(1.1, 2.7))
    assert build(sample, resolver, BuildOptions(cut_clips=True)).notes == (KEPT_WHOLE,)
    assert build(sample, resolver, BuildOptions()).notes == ()


def test_cut_films_are_smaller():
    whole = probe_video(film(gop=10, options={"sc_threshold": "0"}), "mp4")
    cut, moved = cut_packets(whole, (1.0, 1.5))
    assert len(cut.content()) < len(whole.content()) and moved == (0.0, 0.5) and cut.notes == ()


def test_the_height_is_that_of_the_film_as_shown():
    """A film of 160 x 120 that is shown upright, 120 x 160."""
    turned = probe_video(film(20, matrix=display_matrix(0, -1, 1, 0)), "mp4")
    assert turned.size == (120, 160)
    made, _ = reencode(turned, None, Wanted(height=100), cut=False)
    assert made.size == (76, 100) and made.frames == 20
    assert reencode(turned, None, Wanted(height=160), cut=False)[0] is turned
    flat = probe_video(film(20, size=(160, 90), matrix=display_matrix(0, -1, 1, 0)), "mp4")
    assert reencode(flat, None, Wanted(height=100), cut=False)[0].size == (56, 100)


def test_frames_keep_their_times_and_get_key_frames():
    ticks = [i * 33 + i % 7 * 3 for i in range(90)]
    whole = probe_video(
        film(90, "matroska", ticks=ticks, timescale=1000, gop=600, options={"sc_threshold": "0"}), "mkv"
    )
    assert whole.gop == 90
    made, _ = reencode(whole, None, Wanted(gop=10), cut=False)
    assert made.gop <= 10 and made.frames == 90 and made.duration == pytest.approx(whole.duration, abs=1e-3)
    slower, _ = reencode(whole, None, Wanted(fps=10.0, gop=7), cut=False)
    assert slower.fps == pytest.approx(10, rel=0.02) and slower.gop <= 7
    clip = read_video(made.content(), VideoConfig(max_fps=10), side=112)
    assert numbers(clip.frames) == numbers(read_video(whole.content(), VideoConfig(max_fps=10), side=112).frames)


# --- damaged films ---------------------------------------------------------------------------------------------------


def half_zeros() -> bytes:
    """An mp4 whose header is there, while the second half of its frames never came."""
    data = film(90, gop=12)
    header = data.rindex(b"moov") - 4
    half = header // 2
    return data[:half] + bytes(header - half) + data[header:]


SMALLER = {
    "gop": BuildOptions(gop=5),
    "height": BuildOptions(video_height=60),
    "fps": BuildOptions(video_fps=10.0),
    "gop of the clip": BuildOptions(gop=5, cut_clips=True),
}


@pytest.mark.parametrize("option", SMALLER)
def test_frames_that_are_lost_are_counted_when_their_film_is_encoded_again(resolver, tmp_path, option):
    """After that nobody can count them any more: the stand-ins are frames of the new film."""
    (tmp_path / "x.mp4").write_bytes(half_zeros())
    (tmp_path / "whole.mp4").write_bytes(film(90, gop=12))
    clip = (0.5, 2.9) if SMALLER[option].cut_clips else None

    def made(name):
        built = build(Sample("s", [qa("q", "a")], video=File(name), clip=clip), resolver, SMALLER[option])
        content = built.members["mp4"]
        assert isinstance(content, bytes), "encoded again"
        part = json.loads(built.members["json"]).get("clip")
        return built, read_video(content, VideoConfig(max_frames=80, max_fps=10), side=112, clip=part)

    before = read_video((tmp_path / "x.mp4").read_bytes(), VideoConfig(max_frames=80, max_fps=10), side=112, clip=clip)
    assert before.decoding.replaced > len(before.times) // 3
    built, after = made("x.mp4")
    assert built.notes == (MANY_REPLACED,) and after.decoding.replaced == 0
    assert numbers(after.frames) == numbers(before.frames)
    assert made("whole.mp4")[0].notes == ()


def test_a_few_lost_frames_are_told_from_many():
    data = bytearray(film(240, gop=12))
    middle = data.rindex(b"moov") // 2
    data[middle : middle + 400] = bytes(400)
    whole = probe_video(bytes(data), None)
    every = read_video(whole.content(), VideoConfig(max_frames=300, max_fps=30), side=28)
    assert 0 < every.decoding.replaced <= 12
    made, _ = reencode(whole, None, Wanted(height=100), cut=False)
    assert made.notes == (REPLACED,) and made.frames == 240
    part, _ = reencode(whole, (0.0, 1.0), Wanted(height=100), cut=True)
    assert part.notes == (), "of the part that is kept"


def test_training_takes_what_is_re_encoded_within_its_limits():
    whole = probe_video(film(90, gop=30), None)
    for limits in (LimitsConfig(pixels=160 * 120 - 1), LimitsConfig(video_frames=89), LimitsConfig(video_seconds=2.9)):
        with pytest.raises(MediaError, match="limits"):
            reencode(whole, None, Wanted(gop=5), cut=False, config=DataConfig(limits=limits))
        assert cut_packets(whole, (1.1, 1.5), DataConfig(limits=limits))[0].notes == (KEPT_WHOLE,)
    assert cut_packets(whole, (1.1, 1.5))[0].notes == ()


# --- films that are slow to read ------------------------------------------------------------------------------------


@pytest.fixture
def resolver(tmp_path):
    return Resolver((tmp_path,), tmp_path / "cache", Downloader(tmp_path / "cache"))


def test_long_gops_are_noted_and_mended(resolver, tmp_path):
    """80 s with one key frame: sampled 8 times, all its frames are decoded for that."""
    slow = film(2400, size=(32, 32), gop=2400, bframes=0, options={"preset": "ultrafast", "sc_threshold": "0"})
    for name, data in {"slow.mp4": slow, "bunny.mp4": (MEDIA / "bunny.mp4").read_bytes()}.items():
        (tmp_path / name).write_bytes(data)
    notes = {}
    for name in ("slow.mp4", "bunny.mp4"):
        made = build(Sample(name, [qa("q", "a")], video=File(name), clip=(0.0, 4.0)), resolver, BuildOptions())
        assert isinstance(made, Built)
        notes[name] = made.notes
    assert notes == {"slow.mp4": (), "bunny.mp4": ()}, "a short clip of a slow film samples often"
    sample = Sample("s", [qa("q", "a")], video=File("slow.mp4"), sampling={"max_frames": 8})
    assert build(sample, resolver, BuildOptions()).notes == (SLOW_TO_READ,)
    assert build(sample, resolver, BuildOptions(gop=60)).notes == ()


def test_prepare_says_which_films_are_slow_to_read(tmp_path, capsys):
    options = {"preset": "ultrafast", "sc_threshold": "0"}
    (tmp_path / "slow.mp4").write_bytes(film(2400, size=(32, 32), gop=2400, bframes=0, options=options))
    row = {"video": "slow.mp4", "question": "q", "answer": "a", "sampling": {"max_frames": 8}}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    command = ["prepare", str(tmp_path / "data.jsonl"), "--workers", "0"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert re.search(r" 1  long GOPs: over 100 frames .* --gop 60 .*\(the first: 0*1\)", capsys.readouterr().out)
    assert main([*command, "--out", str(tmp_path / "b"), "--gop", "60"]) == 0
    assert "long GOPs" not in capsys.readouterr().out


def test_notes_are_counted_across_resumes_and_written_with_the_manifest(tmp_path):
    options = {"records_per_shard": 2, "tool": "t"}
    record = {"json": b"{}"}
    out = tmp_path / "set"
    with Output(out, {}, **options) as output:
        for key in ("a", "b", "c"):
            output.add(key, Built(key, record, notes=("odd",) if key != "a" else ()))
    with Output(out, {}, **options) as output:
        for key in ("a", "b"):
            output.seen(key)
        for key in ("c", "d"):
            output.add(key, Built(key, record, notes=("odd", "rare") if key == "d" else ("odd",)))
        output.finish({"name": "set"})
    assert read_head(out / MANIFEST)["notes"] == {"odd": [3, "b"], "rare": [1, "d"]}


def test_settings_of_before_are_those_of_now(tmp_path):
    """A data set prepared before --gop was known is not refused."""
    source = own_source(tmp_path / "x.jsonl", "x")
    assert "gop" not in json.dumps(Options().settings(source))
    assert Options(build=BuildOptions(gop=60)).settings(source)["gop"] == 60
