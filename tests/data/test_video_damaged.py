"""Films that are cut off or damaged inside: what is said of them, and that training takes what can be decoded."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from data_prep.media_kinds import ENDS_EARLY, ENDS_INSIDE, MediaError
from data_prep.probe import probe_video
from molmo2_nemo.data.config import LimitsConfig, VideoConfig
from molmo2_nemo.data.video.cut_off import is_cut_off, stated_length
from molmo2_nemo.data.video.film import look_at
from molmo2_nemo.data.video.frames_pyav import PyAVFrames
from molmo2_nemo.data.video.read import inspect_video, read_video
from molmo2_nemo.errors import DataError
from tests.data.test_video_films import CASES, data_of
from tests.support.films import film, numbers

LIMITS = LimitsConfig()
FAST_START = {"moov_size": "20000"}  # the header before the packets, with some room
CONTAINERS = {
    "mp4": lambda: film(90, "mp4", muxer=FAST_START),
    "mov": lambda: film(90, "mov", muxer=FAST_START),
    "mkv": lambda: film(90, "matroska"),
    "avi": lambda: film(90, "avi", "mpeg4", bframes=0),
    "flv": lambda: film(90, "flv"),
}


def places_of(data: bytes) -> list[tuple[int, int]]:
    """First byte and length of each packet of a film."""
    with av.open(io.BytesIO(data)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size]


def overwritten(data: bytes, packets: list[int], content: bytes = b"\0") -> bytes:
    """A film in which packets are filled with the repeated content."""
    made, places = bytearray(data), places_of(data)
    for at, size in (places[number] for number in packets):
        made[at : at + size] = (content * size)[:size]
    return bytes(made)


def refused(data: bytes) -> int:
    """How many packets the decoder refuses, so that the damage is known to be what is tested."""
    count = 0
    with av.open(io.BytesIO(data)) as container:
        for packet in container.demux(video=0):
            try:
                packet.decode()
            except av.error.InvalidDataError:
                count += 1
    return count


def shown_by(data: bytes, wanted) -> tuple[list[int], int]:
    reader = PyAVFrames(data, look_at(data, LIMITS).index, LIMITS)
    return numbers(np.stack(list(reader.frames(np.asarray(wanted))))), reader.replaced


def test_a_packet_that_the_decoder_refuses_is_a_lost_frame():
    """All frames are key frames, so that nothing else is lost."""
    data = overwritten(film(30, gop=1, bframes=0), [7, 8, 20])
    assert refused(data) == 3
    expected = list(range(30))
    expected[7] = expected[8] = 6
    expected[20] = 19
    assert shown_by(data, range(30)) == (expected, 3)
    for wanted in ([7], [3, 8], [8, 9], [20, 29], [0, 6, 7]):
        shown, replaced = shown_by(data, wanted)
        assert shown == [expected[n] for n in wanted] and replaced == sum(expected[n] != n for n in wanted), wanted


def test_a_lost_packet_at_the_start_is_replaced_by_the_first_frame_there_is():
    data = overwritten(film(30, gop=1, bframes=0), [0, 1])
    assert shown_by(data, [0, 1, 2, 3]) == ([2, 2, 2, 3], 2)
    assert inspect_video(data).frames == 30


def test_where_nothing_can_be_decoded_the_film_is_refused_by_prepare_and_by_training():
    data = overwritten(film(30, gop=1, bframes=0), list(range(30)))
    with pytest.raises(DataError, match="no frame of the video could be decoded"):
        read_video(data, VideoConfig(), side=56)
    with pytest.raises(MediaError, match="no frame of the video could be decoded"):
        probe_video(data, "mp4")


def test_a_lost_frame_among_those_that_others_need():
    """The decoder's frames in order are the oracle: each packet decoded, those that it refuses left out."""
    data = overwritten(film(90, gop=30), [4, 33, 34, 61])
    assert refused(data) > 0
    stamps = look_at(data, LIMITS).index.pts.tolist()
    out: dict[int, int] = {}
    with av.open(io.BytesIO(data)) as container:
        for packet in container.demux(video=0):
            try:
                for frame in packet.decode():
                    out[stamps.index(frame.pts)] = numbers(frame.to_ndarray(format="rgb24")[None])[0]
            except av.error.InvalidDataError:
                pass
    there = sorted(out)
    expected = [out[max((n for n in there if n <= number), default=there[0])] for number in range(90)]
    assert shown_by(data, range(90)) == (expected, 90 - len(there))


@pytest.mark.parametrize("share", [0.25, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("name", CONTAINERS)
def test_films_cut_off_are_used_as_far_as_they_go_and_said(name, share):
    whole = CONTAINERS[name]()
    assert probe_video(whole, None).notes == () and not is_cut_off(whole)
    at, size = places_of(whole)[int(90 * share)]
    cut = whole[: at + size // 2]
    video = probe_video(cut, None)
    assert video.notes == (ENDS_EARLY,) and video.duration < 2.6
    assert stated_length(cut, look_at(cut, LIMITS), LIMITS) == pytest.approx(3, abs=0.15)
    clip = read_video(cut, VideoConfig(max_fps=10), side=112)
    shown = numbers(clip.frames)
    assert clip.decoding.replaced <= 2 and shown[:-2] == list(range(0, 90, 3))[: len(shown) - 2]


PACKED = {  # whose headers state no length once they are cut
    "mpg": lambda: film(90, "mpeg", "mpeg2video"),
    "vob": lambda: film(90, "vob", "mpeg2video"),
    "ts": lambda: film(90, "mpegts"),
    "m2ts": lambda: film(90, "mpegts", muxer={"mpegts_m2ts_mode": "1"}),
    "wmv": lambda: film(90, "asf", "wmv2", bframes=0),
    "ogv": lambda: film(90, "ogg", "libvpx", bframes=0),
}


@pytest.mark.parametrize("name", PACKED)
def test_films_that_end_inside_a_packet_are_said(name):
    """Wherever they are cut, but for the ends of their packets: two neighbouring places are not both one."""
    whole = PACKED[name]()
    assert probe_video(whole, None).notes == () and not is_cut_off(whole)
    for share in np.random.default_rng(3).uniform(0.4, 0.95, 12):
        at = int(share * len(whole))
        found = [probe_video(whole[:end], None).notes for end in (at, at + 1)]
        assert (ENDS_INSIDE,) in found or found == [(ENDS_EARLY,)] * 2, (at, found)


@pytest.mark.parametrize("damage", [b"\0", bytes(range(7, 256, 37))])
@pytest.mark.parametrize("name", [*CONTAINERS, "ts"])
def test_what_prepare_calls_good_training_uses(name, damage):
    data = film(90, "mpegts") if name == "ts" else CONTAINERS[name]()
    rng = np.random.default_rng(0)
    for length in (40, 400, 2000):
        for at in rng.integers(len(data) // 10, len(data) - length, 12).tolist():
            broken = data[:at] + (damage * length)[:length] + data[at + length :]
            try:
                probe_video(broken, None)
            except MediaError:
                continue
            for rate in (2, 10):
                clip = read_video(broken, VideoConfig(max_fps=rate), side=56)
                assert clip.frames.shape[0] == len(clip.times), at


@pytest.mark.parametrize("name", ["mp4", "mov", "mkv", "avi"])
def test_a_refused_film_that_is_cut_off_says_so(name):
    data = film(90, "mp4") if name == "mp4" else CONTAINERS[name]()
    with pytest.raises(MediaError, match="the file is cut off: download it again"):
        probe_video(data[: 600 if name != "mp4" else len(data) // 2], name)


def test_the_files_of_whole_films_are_not_called_cut_off(tmp_path):
    for name in CASES:
        try:
            data = data_of(name)
        except pytest.skip.Exception:
            continue
        assert inspect_video(data).stated is None and not is_cut_off(data), name
    path = tmp_path / "x.mp4"
    path.write_bytes(film()[:2000])
    assert is_cut_off(path)


def test_a_film_that_is_shorter_than_its_sound_is_not_cut_off():
    file = io.BytesIO()
    with av.open(file, "w", format="flv") as out, av.open(io.BytesIO(film(60))) as source:
        made = out.add_stream_from_template(source.streams.video[0])
        sound = out.add_stream("mp3", rate=44100)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = made
                out.mux(packet)
        for number in range(200):  # 5 s
            frame = av.AudioFrame(format="s16p", layout="stereo", samples=1152)
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.sample_rate, frame.pts = 44100, number * 1152
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    info = inspect_video(file.getvalue())
    assert info.duration == pytest.approx(2, abs=0.1) and info.stated is None
