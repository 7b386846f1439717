"""Finding and looking at media: real pictures and videos, made here or the demo's."""

from __future__ import annotations

import io
import tarfile

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.demo import MEDIA
from data_prep.download import Downloader
from data_prep.encode import encode_frames
from data_prep.media import Resolver
from data_prep.media_kinds import MediaError
from data_prep.probe import probe_image, probe_video
from data_prep.record_builder import BuildOptions, Built, build
from data_prep.sources.base import ArchiveMember, Cut, File, FirstOf, Frames, Inline, Lettered, Prepared, Sample
from data_prep.sources.shapes import qa
from data_prep.transcode import Wanted, cut_packets, reencode
from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.data.picture_decoder import TRUNCATED
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.video.read import read_video

BUNNY = (MEDIA / "bunny.mp4").read_bytes()
CAT = (MEDIA / "cat.jpg").read_bytes()
QA = [qa("q", "a")]


@pytest.fixture
def resolver(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    return Resolver((folder,), tmp_path / "cache", Downloader(tmp_path / "cache"), tmp_path / "shards")


def put(resolver, name, content=CAT):
    path = resolver.folders[0] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_files_with_and_without_suffix(resolver):
    put(resolver, "a/one.jpg", b"1")
    put(resolver, "b/two.webm", b"2")
    put(resolver, "c/only.mkv", b"3")
    put(resolver, "c/notes.txt", b"")
    for names, content in [
        (("a/one.jpg",), b"1"),
        (("a/one",), b"1"),
        (("a/none", "b/two"), b"2"),
        (("c/",), b"3"),
        (("a/../b/two.webm",), b"2"),
    ]:
        assert resolver.read(File(*names))[0] == content
    put(resolver, "c/second.mp4", b"")
    (resolver.folders[0].parent / "outside.jpg").write_bytes(b"x")
    for name in ("a/two", "a/one.png", "c/", "../outside.jpg", "/etc/passwd", "", "a\0b", "a"):
        with pytest.raises(MediaError, match="media not found"):
            resolver.read(File(name))
    resolver.max_bytes = 0
    with pytest.raises(MediaError, match="too large"):
        resolver.read(File("a/one.jpg"))


def test_links_in_the_folder_are_followed_and_names_out_of_it_are_not(resolver, tmp_path):
    """The folder's owner made them, as the Hub's cache is made of them; rows cannot: they have names only."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "5f").write_bytes(CAT)
    put(resolver, "own.jpg", b"own")
    root = resolver.folders[0]
    (root / "cat.jpg").symlink_to("../blobs/5f")
    (root / "all").symlink_to(tmp_path / "blobs")
    (root / "gone.jpg").symlink_to("../blobs/60")
    assert resolver.read(File("cat.jpg")) == (CAT, "jpg")
    assert resolver.read(File("all/5f"))[0] == CAT
    for name in ("../blobs/5f", f"{tmp_path}/blobs/5f", "all/../../blobs/5f"):
        with pytest.raises(MediaError, match="media not found"):
            resolver.read(File(name))
    with pytest.raises(MediaError, match=r"it is a link to \.\./blobs/60, which does not exist"):
        resolver.read(File("gone.jpg"))


def test_first_of_and_members_of_archives(resolver):
    with tarfile.open(resolver.folders[0] / "pack.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("inner/cat.jpg")
        info.size = len(CAT)
        tar.addfile(info, io.BytesIO(CAT))
    inside = ArchiveMember(File("pack.tar.gz"), "inner/cat")
    assert resolver.read(inside) == (CAT, "jpg")
    assert resolver.read(FirstOf(File("cat"), inside))[0] == CAT
    with pytest.raises(MediaError, match="media not found"):
        resolver.read(FirstOf(File("cat"), ArchiveMember(File("pack.tar.gz"), "inner/dog")))
    put(resolver, "bad.zip", b"PK damaged")
    with pytest.raises(MediaError, match="bad archive"):
        resolver.read(ArchiveMember(File("bad.zip"), "x"))


def test_pictures_are_decoded_once_whole(resolver):
    picture = probe_image(CAT)
    with Image.open(io.BytesIO(CAT)) as image:
        assert (picture.width, picture.height, picture.suffix) == (*image.size, "jpg")
        turned = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(turned, "JPEG", exif=exif)
        assert (probe_image(turned.getvalue()).height, probe_image(turned.getvalue()).width) == image.size
        ico = io.BytesIO()
        image.resize((16, 16)).save(ico, "ICO")
    assert probe_image(CAT[: len(CAT) // 2]).notes == (TRUNCATED,) and picture.notes == ()
    for bad in (b"", b"x" * 100, CAT[:300], ico.getvalue()):
        with pytest.raises(MediaError, match="image cannot be decoded"):
            probe_image(bad)
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    with pytest.raises(MediaError, match="10000 x 10000|bomb"):
        probe_image(bomb.getvalue())


def test_lettered_pictures_have_letters(resolver):
    put(resolver, "plain.jpg")
    lettered = Lettered(File("plain.jpg"), (("A", 10.0, 10.0, 60.0, 60.0),))
    drawn = resolver.image(lettered)
    plain = np.asarray(Image.open(io.BytesIO(CAT)).convert("RGB")).astype(int)
    after = np.asarray(Image.open(io.BytesIO(drawn.data))).astype(int)
    changed = np.abs(plain - after).max(-1) > 8
    assert drawn.suffix == "png" and changed[10:60, 10:60].mean() > 0.5 and not changed[70:].any()


def test_frames_become_a_video(resolver, tmp_path):
    pictures = [np.full((33, 64, 3), 20 * i, np.uint8) for i in range(12)]
    for i, pixels in enumerate(pictures):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        put(resolver, f"clip/{i:03d}.png", file.getvalue())
    put(resolver, "clip/list.txt", b"")
    video = resolver.video(Frames("clip", 3.0, step=2, first=1, last=4))
    assert (video.frames, video.fps, video.duration, video.size) == (4, 3.0, pytest.approx(4 / 3, abs=1e-3), (64, 32))
    with av.open(str(video.data)) as container:
        levels = [int(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]
    assert np.allclose(levels, [40, 80, 120, 160], atol=4)
    folder = resolver.folders[0] / "clip"
    again = encode_frames(folder, Frames("clip", 3.0, step=2, first=1, last=4), tmp_path / "other")
    assert again.read_bytes() == video.content(), "the same pictures give the same bytes"
    for missing in (Frames("nowhere", 3.0), Frames("clip", 3.0, first=20)):
        with pytest.raises(MediaError, match="media not found"):
            resolver.video(missing)


def shown(video, clip=None, fps=4.0):
    data = video if isinstance(video, bytes) else video.content()
    return read_video(data, VideoConfig(max_frames=40, max_fps=fps), side=56, clip=clip)


@pytest.mark.parametrize("clip", [(0.0, 1.0), (1.3, 2.7), (3.93, 5.0), (2.0, 9.0)])
def test_cutting_keeps_every_frame(clip):
    """The sampled frames of the cut clip are those of the whole video, bit by bit."""
    whole = probe_video(BUNNY, "mp4")
    cut, moved = cut_packets(whole, clip)
    before, after = shown(whole, clip), shown(cut, moved)
    # A clip that runs over the end ends with the file in both.
    assert after.duration == pytest.approx(before.duration, abs=1e-3)
    assert np.array_equal(before.frames, after.frames)
    assert len(cut.content()) <= len(BUNNY)
    again, _ = cut_packets(whole, clip)
    assert again.content() == cut.content()


def test_part_of_a_video_is_cut_and_its_clips_count_from_there(resolver):
    put(resolver, "film.mp4", BUNNY)
    sample = Sample("k", QA, video=Cut(File("film.mp4"), 1.0, 4.0), clip=(0.5, 9.0))
    made = build(sample, resolver, BuildOptions())
    assert isinstance(made, Built)
    record = parse_record(
        "k", {name: c if isinstance(c, bytes) else c.read_bytes() for name, c in made.members.items()}
    )
    assert record.clip[1] - record.clip[0] == pytest.approx(2.5) and made.entry.duration == pytest.approx(2.5)
    assert np.array_equal(shown(record.video, record.clip).frames, shown(BUNNY, (1.5, 4.0)).frames)


def test_reencoding_makes_smaller_videos():
    whole = probe_video(BUNNY, "mp4")
    small, clip = reencode(whole, (1.0, 3.0), Wanted(90, 5.0), cut=True)
    assert small.size == (160, 90) and small.fps == pytest.approx(5.0) and clip == (0.0, 2.0)
    assert small.duration == pytest.approx(2.0, abs=0.01)
    before, after = shown(whole, (1.0, 3.0), 1.0).frames.astype(int), shown(small, clip, 1.0).frames.astype(int)
    assert np.abs(before[:2] - after[:2]).mean() < 12, "the same moments, smaller"
    kept, clip = reencode(whole, (1.0, 3.0), Wanted(1000, 100.0), cut=False)
    assert kept is whole and clip == (1.0, 3.0)
    same, _ = reencode(whole, None, Wanted(90, 5.0), cut=False)
    assert same.duration == pytest.approx(5.0, abs=0.01) and same.frames == 25


def test_media_of_another_prepared_set(resolver, tmp_path):
    def record(**media):
        return b'{"images": ["0.jpg"], "annotations": [{"style": "user_qa", "question": "q", "answer": "a"}]}'

    film = b'{"video": "mp4", "annotations": [{"style": "user_qa", "question": "q", "answer": "a"}]}'
    write_shards(
        tmp_path / "shards" / "base", [("a", {"json": record(), "0.jpg": CAT}), ("b", {"json": film, "mp4": BUNNY})]
    )
    assert resolver.image(Prepared("base", 2)).data == CAT
    assert resolver.video(Prepared("base", 5)).content() == BUNNY
    with pytest.raises(ValueError, match="no folder"):
        resolver.read(Prepared("nothing", 0))
    made = build(Sample("k", QA, images=[Prepared("base", 0)]), resolver, BuildOptions())
    assert isinstance(made, Built) and made.members["0.jpg"] == CAT


def test_subtitles_and_weights_reach_the_record(resolver):
    put(resolver, "film.mp4", BUNNY)
    lines = [(0.0, 1.0, "before"), (1.5, 2.5, " across "), (2.2, 2.8, "inside"), (2.5, 2.6, " "), (4.0, 5.0, "after")]
    sample = Sample("k", QA, video=File("film"), clip=(2.0, 4.0), subtitles=lines, weight_factor=0.5)
    data = parse_record("k", build_members(sample, resolver))
    assert [(s.start, s.end, s.text) for s in data.subtitles] == [
        (0.0, 0.5, "across"),
        (pytest.approx(0.2), 0.8, "inside"),
    ]
    assert data.weight_factor == 0.5 and data.clip == (2.0, 4.0)
    text = parse_record("k", build_members(Sample("k", QA, video=File("film"), subtitles="all of it"), resolver))
    assert text.subtitles == "all of it"
    backwards = build(Sample("k", QA, video=File("film"), subtitles=[(2.0, 1.0, "x")]), resolver, BuildOptions())
    assert backwards.reason == "bad sample" and "start <= end" in backwards.detail


def build_members(sample, resolver):
    made = build(sample, resolver, BuildOptions())
    assert isinstance(made, Built), made
    return {name: c if isinstance(c, bytes) else c.read_bytes() for name, c in made.members.items()}


def test_inline_videos(resolver):
    members = build_members(Sample("k", QA, video=Inline(BUNNY, "mp4")), resolver)
    assert members["mp4"] == BUNNY
