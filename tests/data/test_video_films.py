"""The frames of many kinds of films, by both decoders: those that the pictures themselves say, and those that the
ffmpeg program shows."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import product

import av
import numpy as np
import pytest
import torch
from av import codecs_available
from av.stream import Disposition

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, LimitsConfig, VideoConfig
from molmo2_nemo.data.resize import resize
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.container import Deadline, open_video
from molmo2_nemo.data.video.decoders import check_decoder, frames_of
from molmo2_nemo.data.video.film import look_at
from molmo2_nemo.data.video.frames_pyav import PyAVFrames, ScrambledStamps, reader_of
from molmo2_nemo.data.video.frames_torchcodec import problem
from molmo2_nemo.data.video.index import NONE, Packets, index_of, scan, seconds_of
from molmo2_nemo.data.video.orientation import nearest, upright
from molmo2_nemo.data.video.read import decode_video, inspect_video, plan_video, read_video
from molmo2_nemo.data.video.sampling import TimeSampler
from molmo2_nemo.errors import DataError, UserError
from tests.support.fields import film_of_fields
from tests.support.films import SIZE, display_matrix, film, numbers, picture, remuxed

torch.set_num_threads(1)
LIMITS = LimitsConfig()
TOKENIZER = Molmo2Tokenizer.load("tiny")
TORCHCODEC = problem("cpu")
FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="needs the ffmpeg program (apt-get install ffmpeg)")
needs_torchcodec = pytest.mark.skipif(TORCHCODEC is not None, reason=str(TORCHCODEC))
DECODERS = ["pyav", pytest.param("torchcodec", marks=needs_torchcodec)]
X264 = "x264-params"


@dataclass(frozen=True)
class Case:
    make: Callable[[], bytes]
    shows: tuple[int, ...] = tuple(range(90))
    codec: str = "libx264"  # that its encoder needs
    torchcodec: bool = False  # TorchCodec reads it, not PyAV in its place
    same_colours: bool = True  # other versions of FFmpeg convert its colours to the same bits; greys always

    def comparable(self, frames: np.ndarray) -> np.ndarray:
        """What of [C, H, W, 3] all versions agree on: without same colours, the grey part below the mark."""
        return frames if self.same_colours else frames[:, frames.shape[1] // 2 :]


def plain(container: str, codec: str, **options) -> Case:
    chosen = {key: options.pop(key) for key in ("torchcodec", "same_colours") if key in options}
    return Case(lambda: film(90, container, codec, **options), codec=codec, **chosen)


def in_decoding_order(number, packet):
    packet.pts = packet.dts = number * 512


def later(number, packet):
    """Half a second before 0, which an edit list hides."""
    packet.pts, packet.dts = packet.pts - 512 * 15, packet.dts - 512 * 15


def without_duration(number, packet):
    packet.duration = 0


def cover() -> bytes:
    return film(1, "matroska", "mjpeg", bframes=0, size=(320, 240), pixels="yuvj420p", first=200)


def cover_first() -> bytes:
    """An mp4 whose tags, with the cover, stand before its tracks, as in files of some shops."""
    data = remuxed([film(), cover()], "mp4", flags=[Disposition.default, Disposition.attached_pic])
    moov = data.index(b"moov") - 4
    end = moov + int.from_bytes(data[moov : moov + 4], "big")
    boxes, at = [], moov + 8
    while at < end:
        size = int.from_bytes(data[at : at + 4], "big")
        boxes.append(data[at : at + size])
        at += size
    boxes.sort(key=lambda box: box[4:8] == b"trak")
    return data[: moov + 8] + b"".join(boxes) + data[end:]


def joined(container: str, codec: str, *counts: int) -> bytes:
    firsts = np.cumsum([0, *counts])
    return b"".join(film(n, container, codec, first=int(at)) for n, at in zip(counts, firsts, strict=False))


CASES = {
    "mp4 h264": plain("mp4", "libx264", torchcodec=True),
    "mov h264": plain("mov", "libx264", torchcodec=True),
    "mkv h264": plain("matroska", "libx264", torchcodec=True),
    "ts h264": plain("mpegts", "libx264"),
    "flv h264": plain("flv", "libx264"),
    "avi h264": plain("avi", "libx264"),
    "mp4 hevc": plain("mp4", "libx265", torchcodec=True, options={"x265-params": "log-level=none"}),
    "ts hevc": plain("mpegts", "libx265", options={"x265-params": "log-level=none"}),
    "mp4 av1": plain("mp4", "libsvtav1", bframes=0, torchcodec=True, options={"svtav1-params": "lp=1"}),
    "webm vp8": plain("webm", "libvpx", bframes=0, torchcodec=True),
    "webm vp9": plain("webm", "libvpx-vp9", bframes=0, torchcodec=True),
    "mpg mpeg1": plain("mpeg", "mpeg1video"),
    "mpg mpeg2": plain("mpeg", "mpeg2video"),
    "mpg mpeg1 without B": plain("mpeg", "mpeg1video", bframes=0),
    "mpg mpeg2 without B": plain("mpeg", "mpeg2video", bframes=0),
    "vob mpeg2": plain("vob", "mpeg2video"),
    "mpg h264": plain("mpeg", "libx264"),  # one time stamp in a second
    "ts mpeg2": plain("mpegts", "mpeg2video"),
    "avi mpeg4": plain("avi", "mpeg4", bframes=0),
    "avi mpeg4 with B frames": plain("avi", "mpeg4"),
    "mkv mpeg4": plain("matroska", "mpeg4", torchcodec=True),
    "wmv": plain("asf", "wmv2", bframes=0),
    "mp4 in fragments": plain("mp4", "libx264", torchcodec=True, muxer={"movflags": "frag_keyframe+empty_moov"}),
    "one key frame": plain("mp4", "libx264", torchcodec=True, gop=600),
    "ten bits": plain("mp4", "libx264", torchcodec=True, same_colours=False, pixels="yuv420p10le"),
    "interlaced": plain("mp4", "libx264", torchcodec=True, same_colours=False, options={X264: "tff=1:bframes=2"}),
    "open GOP mkv": plain(
        "matroska", "libx264", torchcodec=True, options={X264: "open-gop=1:keyint=24:bframes=3:b-adapt=0"}
    ),
    "open GOP ts": plain("mpegts", "libx264", options={X264: "open-gop=1:keyint=24:bframes=3:b-adapt=0"}),
    "B pyramid": plain(
        "mp4", "libx264", torchcodec=True, gop=30, options={X264: "b-pyramid=normal:bframes=7:b-adapt=0:ref=4"}
    ),
    "open GOP hevc": plain(
        "matroska",
        "libx265",
        torchcodec=True,
        options={"x265-params": "log-level=none:open-gop=1:keyint=24:bframes=4:b-adapt=0:b-pyramid=1"},
    ),
    "intra refresh ts": plain("mpegts", "libx264", options={X264: "intra-refresh=1:keyint=24:bframes=2"}),
    "clock from 5 s": plain("matroska", "libx264", torchcodec=True, muxer={"output_ts_offset": "5"}),
    "clock that wraps": plain("mpegts", "libx264", muxer={"output_ts_offset": "95442.5"}),
    "variable rate": plain(
        "matroska", "libx264", torchcodec=True, ticks=[i * 33 + i % 7 * 3 for i in range(90)], timescale=1000
    ),
    "edit list": Case(
        lambda: remuxed([film()], "mp4", later, muxer={"avoid_negative_ts": "disabled"}), tuple(range(15, 90))
    ),
    "no durations": Case(lambda: remuxed([film()], "flv", without_duration)),
    "cover first": Case(cover_first),
    "cover last": Case(
        lambda: remuxed([film(), cover()], "mp4", flags=[Disposition.default, Disposition.attached_pic]),
        torchcodec=True,
    ),
    "larger film second": Case(lambda: remuxed([film(size=(80, 60), first=100), film()], "mpegts")),
    "default film second": Case(
        lambda: remuxed(
            [film(size=(240, 180), first=100), film()], "matroska", flags=[Disposition(0), Disposition.default]
        ),
        torchcodec=True,
    ),
    "joined ts": Case(lambda: joined("mpegts", "libx264", 60, 30)),
    "joined ts of three": Case(lambda: joined("mpegts", "libx264", 40, 30, 20)),
    "joined mpg": Case(lambda: joined("mpeg", "mpeg2video", 60, 30)),
    "scrambled mkv": Case(lambda: remuxed([film()], "matroska", in_decoding_order)),
    "scrambled mp4": Case(lambda: remuxed([film()], "mp4", in_decoding_order)),
}


@cache
def data_of(name: str) -> bytes:
    if CASES[name].codec not in codecs_available:
        pytest.skip(f"this PyAV has no {CASES[name].codec}")
    return CASES[name].make()


def decoded(data: bytes, wanted, decoder: str = "pyav") -> tuple[np.ndarray, str]:
    """Frames with these numbers, and the decoder that read them."""
    reader = frames_of(decoder, data, look_at(data, LIMITS), LIMITS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyAV reads a film in TorchCodec's place
        return np.stack(list(reader.frames(np.asarray(wanted)))), reader.used


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", CASES)
def test_every_frame_in_the_order_of_showing(name, decoder):
    case, data = CASES[name], data_of(name)
    frames, used = decoded(data, range(len(look_at(data, LIMITS).index.pts)), decoder)
    assert numbers(frames) == list(case.shows)
    assert used == (decoder if case.torchcodec else "pyav")
    if decoder != "pyav":
        assert np.array_equal(case.comparable(frames), case.comparable(decoded(data, range(len(frames)))[0]))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", CASES)
def test_chosen_frames_are_the_same_as_of_all(name, decoder):
    """However they are reached: by decoding on, by seeking, with others skipped."""
    case, data = CASES[name], data_of(name)
    count = len(case.shows)
    whole, _ = decoded(data, range(count), decoder)
    rng = np.random.default_rng(len(name))
    some = [np.sort(rng.choice(count, size, replace=False)).tolist() for size in (2, 5, 11, 30)]
    for wanted in (range(0, count, 7), range(3, count, 13), range(count // 2, count, 31), [count - 1], *some):
        assert np.array_equal(decoded(data, wanted, decoder)[0], whole[list(wanted)]), list(wanted)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if len(case.shows) == 90 and "variable" not in n])
def test_three_seconds_at_ten_frames_a_second(name, decoder):
    data = data_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = read_video(data, VideoConfig(max_fps=10, decoder=decoder), side=112)
    assert (clip.size, clip.decoding.replaced) == (SIZE, 0) and abs(clip.duration - 3) < 0.002
    assert numbers(clip.frames) == [*range(0, 90, 3), 89]


# --- against the ffmpeg program -------------------------------------------------------------------------------------


def ffmpeg_frames(data: bytes, tmp_path) -> tuple[np.ndarray, np.ndarray]:
    """All frames as the ffmpeg program shows them, uint8 [n, H, W, 3], and their times from the first, float64 [n]."""
    path = tmp_path / "film"
    path.write_bytes(data)
    command = [str(FFMPEG), "-hide_banner", "-i", str(path), "-an", "-vsync", "passthrough", "-vf", "showinfo"]
    done = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    said = done.stderr.decode(errors="replace")
    times = np.array([float(t) for t in re.findall(r"showinfo.*? pts_time:\s*(\S+)", said)])
    width, height = map(int, re.findall(r"rgb24.*?, (\d{2,5})x(\d{2,5})", said)[-1])
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3), times - times[0]


@needs_ffmpeg
@pytest.mark.parametrize("name", CASES)
def test_the_ffmpeg_program_shows_the_same_frames(name, tmp_path):
    """Frames, pixels and times; its times of scrambled films are those of no frame, and are not compared."""
    case, data = CASES[name], data_of(name)
    expected, times = ffmpeg_frames(data, tmp_path)
    index = look_at(data, LIMITS).index
    frames, _ = decoded(data, range(len(index.pts)))
    assert frames.shape == expected.shape and numbers(frames) == numbers(expected)
    assert np.abs(case.comparable(frames).astype(int) - case.comparable(expected)).max() <= 2
    if index.order != "counted" or index.first_is_right:
        np.testing.assert_allclose((index.pts - index.pts[0]) * float(index.base), times, atol=1e-4)


@needs_ffmpeg
@pytest.mark.parametrize("turns", product((1, -1), (1, -1), (False, True)))
def test_the_ffmpeg_program_turns_and_mirrors_alike(turns, tmp_path):
    across, down, turned = turns
    matrix = display_matrix(0, down, across, 0) if turned else display_matrix(across, 0, 0, down)
    data = film(3, matrix=matrix)
    frames, _ = decoded(data, range(3))
    expected, _ = ffmpeg_frames(data, tmp_path)
    assert frames.shape == expected.shape and np.abs(frames.astype(int) - expected).max() <= 2


# --- orientation ----------------------------------------------------------------------------------------------------

EIGHT = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("orientation", EIGHT)
def test_upright_moves_every_pixel_as_the_matrix_says(orientation):
    a, b, c, d = orientation
    pixels = np.arange(3 * 5).reshape(3, 5)
    shown = {}
    for y, x in np.ndindex(3, 5):
        shown[(b * x + d * y, a * x + c * y)] = pixels[y, x]
    rows, columns = (sorted({place[i] for place in shown}) for i in (0, 1))
    assert upright(pixels, orientation).tolist() == [[shown[(row, column)] for column in columns] for row in rows]
    assert nearest(*(900 * v + 90 for v in orientation)) == orientation


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", EIGHT)
def test_films_are_shown_upright(orientation, decoder):
    """The whole display matrix, flips too; a film that is stored turned the other way is shown as it was taken."""
    data = film(2, matrix=display_matrix(*orientation))
    shown = upright(picture(1), orientation)
    frames, _ = decoded(data, [0, 1], decoder)
    assert frames[1].shape == shown.shape and np.abs(frames[1].astype(int) - shown)[::8, ::8].mean() < 6
    assert inspect_video(data).size == plan_video(data, VideoConfig()).size == (shown.shape[1], shown.shape[0])


# --- time stamps ----------------------------------------------------------------------------------------------------


def packets(pts, dts=None, durations=0, keys=(0,)):
    pts = np.array(pts, np.int64)
    is_key = np.isin(np.arange(len(pts)), keys)
    return Packets(pts, pts if dts is None else np.array(dts, np.int64), np.full(len(pts), durations), is_key)


def test_films_without_any_time_stamps_run_at_their_rate():
    found = index_of(packets([NONE] * 5), Fraction(1, 1000), Fraction(30))
    assert (found.order, found.pts.tolist(), found.end) == ("counted", [0, 33, 67, 100, 133], 167)
    with pytest.raises(DataError, match="no time stamps and no frame rate"):
        index_of(packets([NONE] * 5), Fraction(1, 1000), None)


def test_a_last_frame_without_a_duration_lasts_as_long_as_the_others():
    assert index_of(packets([0, 40, 80, 90, 130]), Fraction(1, 1000), None).end == 170
    assert index_of(packets([0, 40, 80], durations=25), Fraction(1, 1000), None).end == 105
    assert index_of(packets([7]), Fraction(1, 1000), None).duration == 0


def test_an_uneven_clock_is_not_a_joined_one():
    """Steps back of less than a tenth of a second, and frames shown before a key frame that they follow in the file."""
    uneven = index_of(packets([0, 40, 120, 110, 160], keys=range(5)), Fraction(1, 1000), None)
    leading = index_of(packets([0, 400, 200, 800, 600], dts=[0, 1, 2, 3, 4], keys=(0, 3)), Fraction(1, 1000), None)
    assert uneven.order == leading.order == "stamps" and leading.keys.tolist() == [0, 800]
    again = index_of(packets([0, 40, 80, 0, 40], keys=(0, 3), durations=40), Fraction(1, 100), None)
    assert (again.order, again.pts.tolist(), again.joints) == ("joined", [0, 40, 80, 120, 160], ((0, 0), (3, 120)))


def test_stamps_that_prove_scrambled_later():
    """A film that was taken for sound, as its first frames were: what does not fit is noticed, all is counted anew."""
    data = remuxed([film()], "matroska", in_decoding_order)
    plan = plan_video(data, VideoConfig(max_fps=10))
    assert plan.film.index.order == "counted"
    taken_for_sound = replace(plan.film.index, order="stamps", in_decoding_order=True)
    with pytest.raises(ScrambledStamps):
        list(PyAVFrames(data, taken_for_sound, LIMITS).frames(plan.numbers))
    clip = decode_video(data, replace(plan, film=replace(plan.film, index=taken_for_sound)), side=112)
    assert numbers(clip.frames) == plan.numbers.tolist()


# --- plan and decoding ----------------------------------------------------------------------------------------------


def test_a_plan_and_its_decoding_are_two_steps():
    data = film(90)
    plan = plan_video(data, VideoConfig(max_fps=4), clip=(0.5, 2.0))
    assert numbers(np.stack([picture(n) for n in plan.numbers])) == [15, 22, 30, 37, 45, 52, 60]
    clip, read = decode_video(data, plan, side=56), read_video(data, VideoConfig(max_fps=4), side=56, clip=(0.5, 2.0))
    assert np.array_equal(clip.frames, read.frames) and clip.size == plan.size and clip.duration == plan.duration
    frames, _ = decoded(data, plan.numbers)
    assert np.array_equal(clip.frames, np.stack([resize(pixels, 56, 56) for pixels in frames]))


def test_frames_that_cannot_be_decoded_are_counted():
    """A broadcast that is tuned in between key frames: the first frame that can be shown stands for those before it."""
    data = film(90, "mpegts", gop=30)
    cut = data[len(data) // 5 // 188 * 188 :]
    index = look_at(cut, LIMITS).index
    reader = PyAVFrames(cut, index, LIMITS)
    shown = numbers(np.stack(list(reader.frames(np.arange(len(index.pts))))))
    first = shown[0]
    assert reader.replaced > 3 and shown == [first] * reader.replaced + list(range(first, 90))
    assert read_video(cut, VideoConfig(), side=56).decoding.replaced == 1


def test_what_stands_in_does_not_depend_on_what_else_is_wanted():
    data = film(90, "mpegts", gop=30)
    cut = data[len(data) // 5 // 188 * 188 :]
    count = len(look_at(cut, LIMITS).index.pts)
    whole, _ = decoded(cut, range(count))
    for wanted in ([0], [3], [0, 1], [0, 40], [2, 5, 40, count - 1]):
        assert np.array_equal(decoded(cut, wanted)[0], whole[wanted]), wanted


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_packets_beyond_the_last_frame_wanted_are_not_read(codec):
    """Before the reader seeks on, and at the end, frames that the decoder holds back are asked for."""
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    data = film(90, "matroska", codec, gop=30, options=quiet)
    for wanted, sent in (([0], 1), ([60], 1), ([0, 30, 60], 1), ([5], 8)):  # since the last key frame, at most
        with open_video(data, LIMITS) as (container, stream):
            index = scan(container, stream, LIMITS, Deadline(60))
            reader = reader_of(container, stream, index, np.array(wanted), Deadline(60))
            assert numbers(np.stack([reader.at(n).to_ndarray(format="rgb24") for n in wanted])) == wanted
            left = sum(1 for packet in container.demux(stream) if packet.size)
            assert 90 - wanted[-1] // 30 * 30 - left <= sent, wanted


@pytest.mark.parametrize("container", ["mpegts", "matroska", "mp4"])
def test_fields_in_packets_of_their_own_are_not_skipped(container):
    """The second field of a wanted frame has another time stamp; that of a frame may be the first that is wanted."""
    data, pictures = film_of_fields(container)
    count = len(look_at(data, LIMITS).index.pts)
    whole, _ = decoded(data, range(count))
    with av.open(io.BytesIO(data)) as film:
        plain = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])
        film.seek(0)
        grey = [np.frombuffer(frame.planes[0], np.uint8).reshape(64, -1)[:, :32] for frame in film.decode(video=0)]
    assert np.array_equal(np.stack(grey), pictures)
    assert count == 2 * len(plain) and np.array_equal(whole, plain.repeat(2, 0))
    rng = np.random.default_rng(0)
    for size in (1, 1, 1, 1, 2, 2, 3, 5, 9):
        wanted = np.sort(rng.choice(count, size, replace=False))
        assert np.array_equal(decoded(data, wanted)[0], whole[wanted]), wanted.tolist()


def test_only_a_cover_is_no_film():
    data = remuxed([cover(), cover()], "mp4", flags=[Disposition.attached_pic] * 2)
    with pytest.raises(DataError, match="only a cover picture, no film"):
        inspect_video(data)


def test_decoders_that_are_not_there_say_what_to_install():
    check_decoder("pyav")
    with pytest.raises(UserError, match="known are pyav, torchcodec and nvdec"):
        check_decoder("decord")
    if TORCHCODEC:
        with pytest.raises(UserError, match="TorchCodec is not installed"):
            ExampleBuilder(DataConfig(video=VideoConfig(decoder="torchcodec")), TOKENIZER)
        with pytest.raises(UserError, match=r"pip install 'molmo2_nemo\[video\]'.*data.video.decoder=pyav"):
            check_decoder("torchcodec")
    elif not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs an NVIDIA GPU"):
            check_decoder("nvdec")


@needs_torchcodec
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.torchcodec])
def test_torchcodec_looks_up_the_same_frames_by_time(name):
    """Which frame is shown at a time, by TorchCodec's own lookup, at marks of 2, 3, 10 and 24 frames a second.

    Where the clock does not begin at 0 it adds the beginning to the marks, and that sum is rounded, so that thirds of a
    second fall before or after their frame; half seconds do not.
    """
    from torchcodec.decoders import VideoDecoder

    data = data_of(name)
    film = look_at(data, LIMITS)
    index, decoder = film.index, VideoDecoder(data, stream_index=film.stream)
    begin = decoder.metadata.begin_stream_seconds_from_content
    assert decoder.metadata.end_stream_seconds_from_content - begin == pytest.approx(index.duration, abs=1e-9)
    for rate in (2, 3, 10, 24) if begin == 0 else (2,):
        times = TimeSampler(128, rate)(index.duration)
        inside = np.clip(times, 1e-6, index.duration - 1e-6)
        shown = decoder.get_frames_played_at((inside + begin).tolist()).pts_seconds.numpy()
        assert np.array_equal(shown, seconds_of(index.pts[index.frame_at(times)], index.base))


@needs_torchcodec
def test_examples_are_the_same_by_either_decoder():
    built = []
    for decoder in ("pyav", "torchcodec"):
        config = DataConfig(image=ImageConfig(crop_size=126, margin=2), video=VideoConfig(max_fps=7, decoder=decoder))
        built.append(ExampleBuilder(config, TOKENIZER).prompt(video=data_of("mp4 h264"), question="What is this?"))
    assert np.array_equal(built[0].crops, built[1].crops) and np.array_equal(built[0].input_ids, built[1].input_ids)
    assert [example.info["decoder"] for example in built] == ["pyav", "torchcodec"]


@needs_torchcodec
def test_torchcodec_says_where_pyav_reads_in_its_place():
    with pytest.warns(UserWarning, match="torchcodec is not used for some videos, PyAV reads them: contain.* mpegts"):
        clip = read_video(data_of("ts h264"), VideoConfig(decoder="torchcodec"), side=56)
    assert clip.decoding.decoder == "pyav"
