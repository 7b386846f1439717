"""Video: the sampling table, layouts, subtitles, and decoding checked against decoding everything."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo2_nemo.data.config import ImageConfig, LimitsConfig, VideoConfig
from molmo2_nemo.data.record import Subtitle
from molmo2_nemo.data.resize import resize
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video import frames_pyav
from molmo2_nemo.data.video.container import Deadline, open_video
from molmo2_nemo.data.video.index import scan
from molmo2_nemo.data.video.read import Decoding, SampledVideo, inspect_video, read_video
from molmo2_nemo.data.video.sampling import TimeSampler
from molmo2_nemo.data.video.tokens import encode_video, subtitle_text, subtitles_shown, timestamp_text, video_token_ids
from molmo2_nemo.errors import DataError

torch.set_num_threads(1)
TOKENIZER = Molmo2Tokenizer.load("tiny")
TINY = ImageConfig(crop_size=126, margin=2)


def make_clip(
    count=60, fps=30, container="mp4", codec="libx264", gop=12, ticks=None, rotation=None, audio=False, size=(64, 48)
):
    """A clip whose frame i has the brightness 4 * i; `ticks` are presentation times in 1/fps seconds."""
    width, height = size
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, fps)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = out.add_stream("aac", rate=16000, layout="mono") if audio else None
        for i in range(count):
            pixels = np.full((height, width, 3), (4 * i) % 256, np.uint8)
            pixels[: height // 4, : width // 4] = (255, 0, 0)  # a red mark at the top left
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (i if ticks is None else ticks[i]), Fraction(1, fps)
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
        if sound:
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            noise.sample_rate, noise.pts = 16000, 0
            for packet in [*sound.encode(noise), *sound.encode()]:
                out.mux(packet)
    return file.getvalue()


def decode_all(data):
    """Oracle: every frame of a file with its time, by decoding from start to end."""
    with av.open(io.BytesIO(data)) as container:
        frames = [(f.pts * float(f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    return sorted(frames, key=lambda pair: pair[0])


def expected_frames(data, times, side, start=0.0):
    frames = decode_all(data)
    begin = frames[0][0]
    picked = []
    for t in times:
        shown = [pixels for at, pixels in frames if at <= max(t + start + begin, begin + 1e-6)]
        picked.append(resize(shown[-1], side, side))
    return np.stack(picked)


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duration, frames, count, head, tail",
    [
        (10, 128, 21, [0, 0.5], [9.5, 10.0]),
        (10, 384, 21, [0, 0.5], [9.5, 10.0]),
        (63.5, 128, 128, [0, 0.5], [63.0, 63.5]),
        (63.5, 384, 128, [0, 0.5], [63.0, 63.5]),
        (100, 128, 128, [0, 100 / 127, 200 / 127], [100]),
        (100, 384, 201, [0, 0.5], [99.5, 100]),
        (300, 128, 128, [0, 300 / 127], [300]),
        (300, 384, 384, [0, 300 / 383], [300]),
        (191.5, 128, 128, [0, 191.5 / 127], [191.5]),
        (191.5, 384, 384, [0, 0.5], [191.0, 191.5]),
        (1.3, 128, 4, [0, 0.5, 1.0, 1.3], []),
        (10.01, 128, 22, [0, 0.5], [10.0, 10.01]),
        (0, 128, 1, [0], []),
    ],
)
def test_uniform_last_frame(duration, frames, count, head, tail):
    times = TimeSampler(frames)(duration)
    assert len(times) == count
    np.testing.assert_allclose(times[: len(head)], head)
    np.testing.assert_allclose(times[count - len(tail) :], tail)


@given(st.floats(0, 2000), st.integers(1, 400), st.sampled_from([0.5, 1, 2, 3.7, 30]))
@settings(deadline=None)
def test_sampling_bounds(duration, frames, fps):
    times = TimeSampler(frames, fps)(duration)
    assert 1 <= len(times) <= frames
    assert times[0] == 0 and np.all(np.diff(times) >= 0)
    assert frames == 1 or times[-1] == duration
    assert np.all(np.diff(times)[:-1] >= 1 / fps - 1e-9)


@pytest.mark.parametrize(
    "duration, candidates, rate, count",
    [(10, (1, 2, 3), 3, 30), (60, (1, 2, 3), 2, 120), (200, (1, 2, 3), 1, 128), (10.4, (1,), 1, 11), (0, (2,), 2, 1)],
)
def test_fps_mode(duration, candidates, rate, count):
    times = TimeSampler(128, mode="fps", candidate_fps=candidates)(duration)
    np.testing.assert_allclose(times, np.arange(count) / rate)


def test_overrides_of_sampling():
    config = VideoConfig(max_frames=64)
    sampler = TimeSampler.of(config, {"frame_sample_mode": "fps", "candidate_sampling_fps": [3, 1, 2]}, 30.0)
    assert (sampler.mode, sampler.candidate_fps) == ("fps", (1.0, 2.0, 3.0))
    assert TimeSampler.of(config, {"mode": "fps", "sampling_fps": 2}, 24.0).candidate_fps == (2, 4, 6, 8)
    assert TimeSampler.of(config, {"mode": "fps", "sampling_fps": 7}, 24.0).candidate_fps == (7,)
    assert TimeSampler.of(config, {"mode": "fps", "sampling_fps": 99}, 24.0).candidate_fps == (99,)
    assert TimeSampler.of(config, {"mode": "fps", "sampling_fps": 1}, 0.4).candidate_fps == (1,)
    assert TimeSampler.of(config, {"max_frames": 500, "max_fps": 1}, 24.0) == TimeSampler(
        64, 1.0, candidate_fps=tuple(float(c) for c in (1, 2, 3, 4, 6, 8))
    )
    with pytest.raises(ValueError, match="unknown video sampling mode 'all'"):
        TimeSampler(8, mode="all")(1.0)
    with pytest.raises(ValueError, match="max_frames >= 1"):
        TimeSampler(0)(1.0)


# --- text and layout ------------------------------------------------------------------------------------------------


def test_timestamps():
    assert [timestamp_text(i, t, "per-frame-compact") for i, t in enumerate((0, 0.7874, 12.5))] == [
        "0.0 ",
        " 0.8 ",
        " 12.5 ",
    ]
    assert timestamp_text(3, 1.5, "per-frame") == "time 1.50"
    assert timestamp_text(3, 1.5, "numbered-frames") == "3:"
    assert timestamp_text(3, 1.5, "none") == ""
    with pytest.raises(ValueError, match="unknown video.time_mode"):
        timestamp_text(0, 0, "clock")


@pytest.mark.parametrize("frame_tokens", [False, True])
def test_layouts(frame_tokens):
    s = TOKENIZER.special
    start, end = (s.frame_start, s.frame_end) if frame_tokens else (s.im_start, s.im_end)
    patches = [s.im_patch] * 2
    stamps = [TOKENIZER.encode(text) for text in ("0.0 ", " 0.5 ")]
    each = video_token_ids(np.array([0, 0.5]), 2, VideoConfig(frame_tokens=frame_tokens), TOKENIZER)
    assert each == [*stamps[0], start, *patches, end, *stamps[1], start, *patches, end]
    config = VideoConfig(frame_tokens=frame_tokens, per_frame_markers=False)
    whole = video_token_ids(np.array([0, 0.5]), 2, config, TOKENIZER)
    assert whole == [start, *stamps[0], *patches, *stamps[1], *patches, end]


@pytest.mark.parametrize("frames, duration, per_frame, single", [(128, 63.5, 11371, 11117), (384, 300.0, 34418, 33652)])
def test_full_lengths(frames, duration, per_frame, single):
    times = TimeSampler(frames)(duration)
    assert len(video_token_ids(times, 81, VideoConfig(), TOKENIZER)) == per_frame
    assert len(video_token_ids(times, 81, VideoConfig(per_frame_markers=False), TOKENIZER)) == single


LINES = [Subtitle(0, 0.4, "hello"), Subtitle(2.2, 3.0, "edge"), Subtitle(5, 6, "later")]
TIMES = np.array([0, 0.5, 1.0, 1.3])


def block(subtitles, times, mode):
    return subtitle_text(subtitles_shown(subtitles, times, mode))


def test_subtitles():
    assert block(LINES, TIMES, "frame_1") == "subtitle\n0.0 - 0.4 hello\n2.2 - 3.0 edge\n"
    assert block("a talk without times\n", TIMES, "frame_1") == "subtitle\na talk without times\n"
    assert block("", TIMES, "all") == block("words", TIMES, "ignore") == ""
    assert block(LINES, TIMES, "frame_0") == "subtitle\n0.0 - 0.4 hello\n"
    assert block(LINES, TIMES, "frame_4").count("\n") == 4
    everything = "subtitle\n0.0 - 0.4 hello\n2.2 - 3.0 edge\n5.0 - 6.0 later\n"
    assert block(LINES, TIMES, "all") == block(LINES, TIMES, "truncate_5") == everything
    assert block(LINES, TIMES, "ignore") == block([], TIMES, "all") == ""
    with pytest.raises(ValueError, match="unknown video.subtitle_mode 'some'"):
        block(LINES, TIMES, "some")


def test_subtitles_follow_the_frames_as_text():
    clip = read_video(make_clip(10), VideoConfig(max_frames=2), side=126)
    plain = encode_video(clip, TINY, VideoConfig(), TOKENIZER).token_ids
    text = TOKENIZER.encode("subtitle\n0.0 - 0.4 <im_patch>\n")
    lines = [Subtitle(0, 0.4, "<im_patch>")]
    for config, expected in [
        (VideoConfig(), text),
        (VideoConfig(max_subtitle_tokens=3), text[:3]),
        (VideoConfig(subtitle_mode="truncate_4", max_subtitle_tokens=6), text[:4]),
    ]:
        assert encode_video(clip, TINY, config, TOKENIZER, subtitles=lines).token_ids == plain + expected


def test_pooling_of_frames():
    frames = np.zeros((2, 378, 378, 3), np.uint8)
    clip = SampledVideo(frames, np.array([0, 0.5]), (378, 378), 0.5, 30.0, Decoding(2, 0, "pyav"))
    visual = encode_video(clip, ImageConfig(), VideoConfig(), TOKENIZER)
    assert visual.pooling.shape == (162, 9) and visual.crops.shape == (2, 729, 588)
    assert visual.pooling[0].tolist() == [0, 1, 2, 27, 28, 29, 54, 55, 56]
    assert visual.pooling[81].tolist() == [729, 730, 731, 756, 757, 758, 783, 784, 785]
    assert (visual.unit_crops, visual.unit_pooled_tokens) == ([1, 1], [81, 81])
    assert visual.token_ids.count(TOKENIZER.special.im_patch) == 162


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "container, codec",
    [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"), ("mpegts", "libx264")],
)
@pytest.mark.parametrize("frames, fps", [(5, 2), (40, 30)])
def test_frames_are_those_shown_at_their_times(container, codec, frames, fps):
    data = make_clip(90, container=container, codec=codec)
    clip = read_video(data, VideoConfig(max_frames=frames, max_fps=fps), side=42)
    assert clip.duration == pytest.approx(3.0, abs=0.002)
    assert len(clip.frames) == len(clip.times) == frames and clip.size == (64, 48)
    assert np.array_equal(clip.frames, expected_frames(data, clip.times, 42))


def test_clip_of_a_video():
    data = make_clip(90)
    clip = read_video(data, VideoConfig(), side=42, clip=(1.0, 2.2))
    np.testing.assert_allclose(clip.times, [0, 0.5, 1.0, 1.2])
    assert np.array_equal(clip.frames, expected_frames(data, clip.times, 42, start=1.0))
    tail = read_video(data, VideoConfig(), side=42, clip=(2.0, 100.0))
    assert tail.duration == pytest.approx(1.0)
    with pytest.raises(ValueError, match="clip 5.0 - 6.0 s does not lie in a video of 3.000 s"):
        read_video(data, VideoConfig(), side=42, clip=(5.0, 6.0))


def test_variable_frame_rate():
    ticks = [0, 1, 2, 30, 31, 60, 61, 62, 63, 89]
    data = make_clip(10, container="matroska", ticks=ticks)
    clip = read_video(data, VideoConfig(max_frames=20, max_fps=4), side=42)
    assert np.array_equal(clip.frames, expected_frames(data, clip.times, 42))
    bright = clip.frames[:, 30, 30, 0].astype(int)
    shown = [max(i for i, tick in enumerate(ticks) if tick / 30 <= t + 1e-3) for t in clip.times]
    assert np.all(np.abs(bright - 4 * np.array(shown)) <= 2)


@pytest.mark.parametrize("angle, corner", [(90, (30, 5)), (-90, (5, 30)), (180, (30, 30))])
def test_rotation_is_applied(angle, corner):
    """The mark at the top left moves with the picture; the frame is square so that only the turn shows."""
    clip = read_video(make_clip(3, size=(64, 64), rotation=angle), VideoConfig(), side=36)
    upright = read_video(make_clip(3, size=(64, 64)), VideoConfig(), side=36)
    assert np.abs(clip.frames[0].astype(int) - np.rot90(upright.frames[0], round(angle / 90)).astype(int)).max() <= 3
    y, x = corner
    assert clip.frames[0, y, x, 0] > 200 and clip.frames[0, y, x, 1] < 60


def test_sound_does_not_matter():
    clip = read_video(make_clip(30, audio=True), VideoConfig(), side=42)
    assert clip.duration == pytest.approx(1.0) and len(clip.frames) == 3


def test_one_frame():
    clip = read_video(make_clip(1), VideoConfig(), side=42)
    assert len(clip.frames) == 2  # the start and the end of a single frame
    assert np.array_equal(clip.frames[0], clip.frames[1])


def test_path_and_bytes_agree(tmp_path):
    data = make_clip(20)
    (tmp_path / "clip.mp4").write_bytes(data)
    from_file = read_video(tmp_path / "clip.mp4", VideoConfig(), side=42)
    assert np.array_equal(from_file.frames, read_video(data, VideoConfig(), side=42).frames)


def test_seeking_saves_decoding():
    data = make_clip(1500, gop=30)
    clip = read_video(data, VideoConfig(max_frames=8), side=42)
    assert np.array_equal(clip.frames, expected_frames(data, clip.times, 42))
    assert clip.decoding.decoded < 300


def test_few_decoded_frames_are_held(monkeypatch):
    """Frames handed out by the decoder and not yet released, at the worst moment: when one of them is asked for, and
    while the next is decoded."""
    alive, asked, decoding = set(), [], []

    class Held:
        def __init__(self, frame):
            self.frame = frame
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

        def __getattr__(self, name):
            return getattr(self.frame, name)

    def held(*args, **options):
        for frame in decode(*args, **options):
            decoding.append(len(alive))
            yield Held(frame)
            del frame

    decode = frames_pyav._decode
    monkeypatch.setattr(frames_pyav, "_decode", held)
    data, limits = make_clip(200), LimitsConfig()
    wanted = np.arange(0, 200, 4)
    with open_video(data, limits) as (container, stream):
        deadline = Deadline(60)
        index = scan(container, stream, limits, deadline)
        reader = frames_pyav.reader_of(container, stream, index, wanted, deadline)
        for number in wanted:
            reader.at(number)
            asked.append(len(alive))
    del reader
    assert len(decoding) > 100 and max(asked) <= 2 and max(decoding) <= 1 and not alive


def test_broken_files():
    whole = make_clip(60)
    for data in (b"", b"hello", whole[: len(whole) // 2], b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n"):
        with pytest.raises(ValueError, match="cannot read video of .* bytes|no frames"):
            read_video(data, VideoConfig(), side=42)
    with pytest.raises(ValueError, match="cannot read video /nowhere.mp4"):
        read_video("/nowhere.mp4", VideoConfig(), side=42)


@pytest.mark.parametrize(
    "limits, message",
    [
        (LimitsConfig(video_seconds=1.0), r"video lasts 2 s; at most 1 s are read \(data.limits.video_seconds\)"),
        (LimitsConfig(video_frames=10), r"more than 10 frames \(data.limits.video_frames\)"),
        (LimitsConfig(pixels=100), r"64 x 48 pixels; at most 100 are read \(data.limits.pixels\)"),
        (LimitsConfig(decode_seconds=0.0), r"more than 0 s of processor time \(data.limits.decode_seconds\)"),
    ],
)
def test_limits_are_settings(limits, message):
    data = make_clip(60)
    read_video(data, VideoConfig(), side=42, limits=LimitsConfig(100_000, 100_000, 64 * 48, 2.1, 60, 60.0))
    with pytest.raises(ValueError, match=message):
        read_video(data, VideoConfig(), side=42, limits=limits)


def test_sound_without_pictures():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        sound = out.add_stream("aac", rate=16000, layout="mono")
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        noise.sample_rate, noise.pts = 16000, 0
        for packet in [*sound.encode(noise), *sound.encode()]:
            out.mux(packet)
    with pytest.raises(ValueError, match="no video stream"):
        read_video(file.getvalue(), VideoConfig(), side=42)


def test_unknown_codec():
    data = make_clip(5, container="matroska")
    assert b"V_MPEG4/ISO/AVC" in data
    with pytest.raises(ValueError, match="no decoder"):
        read_video(data.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"), VideoConfig(), side=42)


def damaged(data, rng):
    changed = bytearray(data)
    for at in rng.integers(len(data), size=int(rng.integers(1, 30))):
        changed[at] = rng.integers(256)
    return bytes(changed[: rng.integers(1, len(data))] if rng.random() < 0.3 else changed)


@pytest.mark.parametrize("container, codec", [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4")])
def test_damaged_files_give_frames_or_one_kind_of_error(container, codec):
    rng, whole = np.random.default_rng(0), make_clip(20, container=container, codec=codec)
    for _ in range(60):
        try:
            clip = read_video(damaged(whole, rng), VideoConfig(max_frames=4), side=42)
        except ValueError:
            continue
        assert 1 <= len(clip.frames) <= 4


def test_a_stream_cut_short_uses_what_is_there():
    """A Matroska file without its last third: the duration is that of the content, not of the header."""
    whole = make_clip(90, container="matroska")
    clip = read_video(whole[: 2 * len(whole) // 3], VideoConfig(), side=42)
    assert 0.5 < clip.duration < 2.9
    assert len(clip.frames) == len(clip.times)


def test_inspection_agrees_with_decoding():
    """Duration, rate, number of frames and size are those that decoding everything finds."""
    clip = make_clip(40)
    info = inspect_video(clip)
    with av.open(io.BytesIO(clip)) as container:
        shown = list(container.decode(video=0))
    sampled = read_video(clip, VideoConfig(max_frames=2), side=14)
    assert (info.frames, info.size, info.suffix) == (len(shown), (shown[0].width, shown[0].height), "mp4")
    assert info.duration == sampled.duration and info.fps == sampled.fps
    with pytest.raises(ValueError, match="cannot read"):
        inspect_video(clip[:200])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_in_place_of_a_film_is_named(kind):
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, kind)
    with (
        pytest.raises(DataError, match="it starts as a JPEG or PNG picture does"),
        open_video(data.getvalue(), LimitsConfig()),
    ):
        raise AssertionError("it was opened")
