"""Clips that we cut have the frames of those that the ffmpeg program cuts as the published scripts run it.

The scripts ask for the encoder libopenh264; libx264 stands in for it here, which changes no frame's number.
"""

from __future__ import annotations

import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.download import Downloader
from data_prep.film_cuts import constant_rate
from data_prep.ledger import media_of, state_of
from data_prep.media import Resolver
from data_prep.record_builder import BuildOptions, Built, build
from data_prep.sources.base import Cut, File, Frames, Match, Media, Sample, Skip
from data_prep.sources.tracking import clip_media
from molmo2_nemo.data.config import LimitsConfig, VideoConfig
from molmo2_nemo.data.record import Record, parse_record
from molmo2_nemo.data.video.container import open_video
from molmo2_nemo.data.video.film import look_at
from molmo2_nemo.data.video.frames_pyav import PyAVFrames
from molmo2_nemo.data.video.read import read_video
from tests.support.films import film, numbers
from tests.support.source_rows import only, prepare

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="needs the ffmpeg program (apt-get install ffmpeg)")
POINT = {"id": 1, "point": [1.0, 1.0]}
VICAS = {
    **{"id": "q", "video": "0123", "expression": "x", "fps": 6, "sampling_fps": 2, "width": 160, "height": 120},
    **{"mask_id": [1], "frame_trajectories": [{"frame": 0, "time": 0.0, "points": [POINT]}]},
}
CAPTION = {"style": "video_long_caption", "text": "Stripes."}
NTSC = [round(i * 1001 / 30000 * 90000) for i in range(240)]
VARIED = np.cumsum([0, *np.random.default_rng(1).integers(1500, 9000, 89)]).tolist()  # 1/90000 s: 10 to 60 a second
SMALL = (64, 48)
FILMS = {
    "constant": lambda: film(90),
    "several B frames and a long GOP": lambda: film(90, bframes=3, gop=60),
    "24 a second": lambda: film(96, fps=24),
    "29.97 a second, said to be 30": lambda: film(240, ticks=NTSC, timescale=90000, size=SMALL),
    "variable": lambda: film(90, ticks=VARIED, timescale=90000, bframes=0),
    "mov": lambda: film(90, "mov"),
    "webm": lambda: film(90, "webm", "libvpx", bframes=0),
}


def resolver(folder: Path) -> Resolver:
    return Resolver((folder,), folder / "cache", Downloader(folder / "cache"))


def all_numbers(data: bytes | Path) -> list[int]:
    limits = LimitsConfig()
    index = look_at(data, limits).index
    return numbers(np.stack(list(PyAVFrames(data, index, limits).frames(np.arange(len(index.pts))))))


def ffmpeg(*arguments: object) -> None:
    subprocess.run([str(FFMPEG), "-nostdin", "-y", *map(str, arguments)], check=True, capture_output=True)


def official_clip(source: Path, target: Path, first: int, last: int, fps: float) -> list[int]:
    """Frames of a clip as `split_video_ffmpeg` of the official script makes it."""
    encode = ["-c:v", "libx264", "-b:v", "4M", "-pix_fmt", "yuv420p", "-g", "60", "-movflags", "+faststart"]
    ffmpeg("-ss", first / fps, "-i", source, "-t", (last - first + 1) / fps, *encode, target)
    return all_numbers(target)


def official_pictures(source: Path, folder: Path) -> list[Path]:
    """Pictures of a film as `extract_frames` of the official script makes them."""
    folder.mkdir(parents=True)
    ffmpeg("-i", source, folder / "frame_%05d.jpg")
    return sorted(folder.iterdir())


def stored(built: Built | Skip) -> Record:
    """The record that training reads."""
    assert isinstance(built, Built), built
    return parse_record("k", {n: c if isinstance(c, bytes) else c.read_bytes() for n, c in built.members.items()})


def ours(folder: Path, media: Media) -> tuple[list[int], float]:
    """All frames of a record with this video that may be shown, and how long they are, seconds."""
    record = stored(build(Sample("k", [CAPTION], video=media), resolver(folder), BuildOptions()))
    index = look_at(record.video, LimitsConfig()).index
    clip = record.clip or (0.0, index.duration)
    first, last = index.frame_at(np.array(clip)).tolist()
    frames = PyAVFrames(record.video, index, LimitsConfig()).frames(np.arange(first, last + 1))
    return numbers(np.stack(list(frames))), clip[1] - clip[0]


PARTS = [(0, 9), (12, 40), (37, 37), (50, 10_000)]


def placed(folder: Path, name: str) -> Path:
    """The film of this name as folder/film.<suffix>."""
    path = folder / f"film.{name if name in ('mov', 'webm') else 'mp4'}"
    path.write_bytes(FILMS[name]())
    return path


@needs_ffmpeg
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", [name for name in FILMS if name != "variable"])
def test_a_clip_has_the_frames_of_the_official_one(name, part, tmp_path):
    first, last = part
    fps = 24 if name.startswith("24") else 30
    path = placed(tmp_path, name)
    expected = official_clip(path, tmp_path / "clip.mp4", first, last, fps)
    found, length = ours(tmp_path, Cut(File("film"), first / fps, (last + 1) / fps, whole_frames=True))
    assert found == expected
    assert abs(length - len(expected) / fps) < 0.002 * len(expected) / fps + 0.1 / fps


@needs_ffmpeg
def test_of_a_film_of_changing_rate_the_program_drops_crowded_frames_that_we_keep(tmp_path):
    path = placed(tmp_path, "variable")
    expected = official_clip(path, tmp_path / "clip.mp4", 12, 40, 30)
    found, _ = ours(tmp_path, Cut(File("film"), 12 / 30, 41 / 30, whole_frames=True))
    assert found == list(range(found[0], found[-1] + 1)) and set(expected) < set(found)
    assert expected[0] == found[0] and abs(expected[-1] - found[-1]) <= 1


@needs_ffmpeg
def test_times_count_from_the_start_of_the_file_where_sound_begins_before_the_picture(tmp_path):
    silent, path = tmp_path / "silent.mp4", tmp_path / "film.mp4"
    silent.write_bytes(FILMS["constant"]())
    sound = ["-f", "lavfi", "-i", "sine=duration=4"]
    ffmpeg("-itsoffset", "0.5", "-i", silent, *sound, "-c:v", "copy", "-c:a", "aac", path)
    expected = official_clip(path, tmp_path / "clip.mp4", 30, 59, 30)
    silent.unlink()
    assert expected[0] == 15
    assert ours(tmp_path, Cut(File("film"), 1.0, 2.0, whole_frames=True))[0] == expected


@needs_ffmpeg
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fps", [1, 2, 3, 6])
def test_training_reads_the_same_frames_at_every_rate(part, fps, tmp_path):
    """The frames that training takes of our clip and of the official one, at rates that the film's own has."""
    first, last = part
    path, clip = placed(tmp_path, "constant"), tmp_path / "clip.mp4"
    official_clip(path, clip, first, last, 30)
    media = Cut(File("film"), first / 30, (last + 1) / 30, whole_frames=True)
    sample = Sample("k", [CAPTION], video=media)
    record = stored(build(sample, resolver(tmp_path), BuildOptions()))
    sampling = {"frame_sample_mode": "fps", "candidate_sampling_fps": [fps]}
    config = VideoConfig(max_frames=128, max_fps=10)
    mine = read_video(record.video, config, clip=record.clip, sampling=sampling, side=112)
    theirs = read_video(clip, config, sampling=sampling, side=112)
    assert numbers(mine.frames) == numbers(theirs.frames)
    np.testing.assert_allclose(mine.times, theirs.times, atol=1e-6)


def test_a_part_after_the_film_is_refused(tmp_path):
    placed(tmp_path, "constant")
    made = build(
        Sample("k", [CAPTION], video=Cut(File("film"), 3.0, 4.0, whole_frames=True)), resolver(tmp_path), BuildOptions()
    )
    assert isinstance(made, Skip) and made.reason == "clip outside the video"


# --- every n-th frame -----------------------------------------------------------------------------------------------


@needs_ffmpeg
@pytest.mark.parametrize("name", FILMS)
def test_pictures_of_a_film_are_those_that_the_program_writes(name, tmp_path):
    """Of films of a changing rate, too: their frames are repeated and left out alike."""
    path = placed(tmp_path, name)
    pictures = official_pictures(path, tmp_path / "pictures")
    expected = numbers(np.stack([np.asarray(Image.open(picture).convert("RGB")) for picture in pictures]))
    index = look_at(path, LimitsConfig()).index
    with open_video(path, LimitsConfig()) as (container, stream):
        rate, start = Fraction(stream.guessed_rate), container.start_time
    found = constant_rate(index, rate, round(Fraction(start, 1_000_000) / index.base))
    shown = numbers(np.stack(list(PyAVFrames(path, index, LimitsConfig()).frames(np.unique(found)))))
    assert [dict(zip(np.unique(found).tolist(), shown, strict=True))[n] for n in found.tolist()] == expected


@needs_ffmpeg
@pytest.mark.parametrize("part", [None, (0, 5), (3, 11)])
def test_a_clip_of_sav_is_made_as_the_official_script_makes_it(part, tmp_path):
    """Film at 24 fps -> pictures -> every fourth, at 6 fps -> clip; from the film as from its pictures."""
    root = tmp_path / "root"
    source = root / "sav/sav_train/sav_000/sav_000001.mp4"
    source.parent.mkdir(parents=True)
    source.write_bytes(FILMS["24 a second"]())
    pictures = official_pictures(source, tmp_path / "pictures")
    listed, whole = tmp_path / "list.txt", tmp_path / "whole.mp4"
    listed.write_text("".join(f"file '{picture}'\n" for picture in pictures[::4]))
    encode = ["-c:v", "libx264", "-b:v", "4M", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    ffmpeg("-f", "concat", "-safe", "0", "-r", 6, "-i", listed, *encode, whole)
    row = {"video_dataset": "sav", "video": "sav_000001", "clip": "sav_000001", "fps": 6}
    expected = all_numbers(whole)
    if part is not None:
        row |= {"clip": "sav_000001_1", "start_frame": part[0], "end_frame": part[1]}
        expected = official_clip(whole, tmp_path / "clip.mp4", *part, 6)
    found, length = ours(root, clip_media(row, {}))
    assert found == expected and length == pytest.approx(len(expected) / 6, abs=1e-3)
    shutil.copytree(tmp_path / "pictures", root / "sav/sav_train/JPEGImages_24fps/sav_000001")
    source.unlink()
    assert ours(root, clip_media(row, {}))[0] == expected


# --- where whole films are ------------------------------------------------------------------------------------------

PLACES = {
    "teamtrack": "TeamTrack/teamtrack/soccer_side/train/videos/v[1].mp4",
    "personpath22": "personpath22/full_videos/v[1].mp4",
    "bdd100k": "bdd100k/bdd100k/videos/train/v[1].mov",
}
CLIPS = {
    "teamtrack": "TeamTrack/videos/train",
    "personpath22": "personpath22/videos/train",
    "bdd100k": "bdd100k/videos/train",
    "sav": "sav/sav_train/videos_fps6",
    "animaltrack": "animaltrack/videos_all",
}


@needs_ffmpeg
@pytest.mark.parametrize("source", PLACES)
def test_clips_are_cut_from_the_raw_download(source, tmp_path):
    root = tmp_path / "root"
    path = root / PLACES[source]
    path.parent.mkdir(parents=True)
    path.write_bytes(film(90, path.suffix[1:]))
    row = {"video_dataset": source, "video": "v[1]", "clip": "v[1]_2", "fps": 30.0, "start_frame": 31, "end_frame": 60}
    assert ours(root, clip_media(row, {}))[0] == official_clip(path, tmp_path / "clip.mp4", 31, 60, 30)
    assert ours(root, clip_media({**row, "clip": "v[1]"}, {}))[0] == list(range(90))


@pytest.mark.parametrize("source", CLIPS)
def test_a_clip_that_is_there_is_taken(source, tmp_path):
    for path in (f"{CLIPS[source]}/v_2.mp4", PLACES.get(source, "sav/sav_train/sav_000/v.mp4").replace("[1]", "")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(film(20 if path.endswith("v_2.mp4") else 90, path.rsplit(".")[-1]))
    row = {"video_dataset": source, "video": "v", "clip": "v_2", "fps": 30, "start_frame": 31, "end_frame": 60}
    assert ours(tmp_path, clip_media(row, {}))[0] == list(range(20))


def test_parts_of_a_long_film_of_drones_share_its_frames():
    row = {"video_dataset": "seadrones", "video": "DJI_0069-1", "clip": "DJI_0069-1", "fps": 30}
    whole = clip_media({**row, "start_frame": 100, "end_frame": 199}, {})
    assert whole.media[1] == Frames("SeaDronesSee/frames/DJI_0069", 30.0, 100, 199)
    row |= {"video": "DJI_0001", "clip": "DJI_0001"}
    assert clip_media({**row, "start_frame": 0, "end_frame": 9}, {}).media[1] == Frames(
        "SeaDronesSee/frames/DJI_0001", 30.0
    )


def test_a_pattern_takes_the_first_file_by_name_and_nothing_outside(tmp_path):
    for name in ("a/b/film.mp4", "a/c/film.mp4", "film.mp4"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"x")
    look = resolver(tmp_path / "root" / "a")
    assert look.file(Match("*/film"))[0] == tmp_path / "root/a/b/film.mp4"
    assert not look.has(Match("../*")) and not look.has(Match("*/film.txt"))
    assert not look.has(File("*/film"))


@needs_ffmpeg
@pytest.mark.parametrize("path", ["ViCaS/videos/0123_a_b.mp4", "ViCaS/videos3/0123.mp4"])
def test_vicas_is_thinned_as_the_official_script_thins_it(path, tmp_path):
    """A film of 24 frames a second -> pictures -> every fourth."""
    root = tmp_path / "root"
    (root / path).parent.mkdir(parents=True)
    (root / path).write_bytes(FILMS["24 a second"]())
    pictures = official_pictures(root / path, tmp_path / "pictures")[::4]
    expected = numbers(np.stack([np.asarray(Image.open(picture).convert("RGB")) for picture in pictures]))
    rates = {"video_original_fps.json": [{"video": "0123", "value": 24}]}
    sample = only(prepare("vicas_track", [VICAS], tables=rates)[0])
    assert ours(root, sample.video)[0] == expected


def test_a_second_call_looks_for_the_films_that_clips_are_cut_from(tmp_path):
    """A film that comes later, and one that changes, is noticed."""
    row = {"video_dataset": "teamtrack", "video": "v", "clip": "v_2", "fps": 30, "start_frame": 3, "end_frame": 6}
    sample, look = Sample("k", [CAPTION], video=clip_media(row, {})), resolver(tmp_path)
    (missing,) = media_of(sample, look)
    assert not missing.there and all(state_of(name, look) is None for name in missing.names)
    path = tmp_path / "TeamTrack/teamtrack/ball/train/videos/v.mp4"
    path.parent.mkdir(parents=True)
    path.write_bytes(film(20))
    assert any(state_of(name, look) for name in missing.names)
    (there,) = media_of(sample, look)
    assert there.names == ("TeamTrack/teamtrack/ball/train/videos/v.mp4",) and state_of(there.names[0], look) == there
    path.write_bytes(film(21))
    assert state_of(there.names[0], look) != there
