"""More broken and hostile input: clocks and lengths of videos, tar bombs, infinite numbers, 100 MB of text, memory."""

import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.manifest import MANIFEST, ShardError
from molmo2_nemo.data.record import BadRecord, parse_record
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.tar_manifest import write_manifest
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.read import read_video

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
TOKENIZER = Molmo2Tokenizer.load("tiny")
QA = {"style": "user_qa", "question": "q", "answer": "a"}


def clip(seconds, container="mp4"):
    """A clip with a frame at each of the given times."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30)
        for number, at in enumerate(seconds):
            pixels = np.full((48, 64, 3), 40 * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(at * 30), Fraction(1, 30)
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return file.getvalue()


# --- videos ---------------------------------------------------------------------------------------------------------


def test_ten_hours_are_refused_without_decoding():
    with pytest.raises(ValueError, match=r"video lasts 3\d{4} s; at most 21600 s are read"):
        read_video(clip([0, 3600, 7200, 36000]), VideoConfig(), side=42)


def test_a_stream_without_frames_is_refused():
    with pytest.raises(ValueError, match="no frames|cannot read video"):
        read_video(clip([]), VideoConfig(), side=42)


@pytest.mark.parametrize("claimed", [0, 1, 10_000_000])
def test_wrong_durations_in_the_header_do_not_matter(claimed):
    """All three places where an MP4 states its length say something else; the frames' own times count."""
    data = bytearray(clip(np.arange(60) / 30))
    plain = read_video(bytes(data), VideoConfig(), side=42)
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):  # of version 0, behind the box's name
        at = data.index(box)
        assert data[at + 4] == 0
        struct.pack_into(">I", data, at + offset, claimed)
    wrong = read_video(bytes(data), VideoConfig(), side=42)
    assert wrong.duration == plain.duration == pytest.approx(2.0, abs=0.05)
    np.testing.assert_array_equal(wrong.frames, plain.frames)
    np.testing.assert_array_equal(wrong.times, plain.times)


# --- shards ---------------------------------------------------------------------------------------------------------


def header(name, size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo("x")
    info.size, info.type = size, kind
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    raw[: len(name)] = name
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


BOMBS = {
    "claims a terabyte": header(b"a.json", 2**40),
    "claims a negative size": header(b"a.json")[:124] + b"\xff" * 12 + header(b"a.json")[136:],
    "sparse member": header(b"a.json", 0, tarfile.GNUTYPE_SPARSE),
    "long name without end": header(b"a", 2**33, tarfile.GNUTYPE_LONGNAME),
    "name that is not text": header(b"a\xff\xfe.json"),
    "zip": b"PK\x03\x04" + b"\0" * 2000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_tar_bombs(tmp_path, name):
    (tmp_path / "x.tar").write_bytes(BOMBS[name] + b"\0" * 2048)
    with pytest.raises(ShardError, match="x.tar"):
        write_manifest(tmp_path, "x")
    assert not (tmp_path / MANIFEST).exists()


# --- records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "1" + "0" * 400])
def test_numbers_that_are_no_numbers(number):
    text = f'{{"annotations": [{{"style": "pointing", "label": "x", "points": [[{number}, 1]], "point_scale": 100}}]}}'
    with pytest.raises(BadRecord):
        parse_record("s:k", {"json": text.encode()})


def test_a_hundred_megabytes_of_text():
    raw = json.dumps({"annotations": [{**QA, "answer": "word " * 20_000_000}]}).encode()
    assert len(raw) > 100_000_000
    with pytest.raises(BadRecord, match=r"more than the \d+ allowed"):
        parse_record("s:k", {"json": raw})
    with pytest.raises(BadRecord, match=r"more than the 100 allowed \(data.limits.json_bytes\)"):
        parse_record("s:k", {"json": raw[:101]}, max_json_bytes=100)


def builder():
    return ExampleBuilder(DataConfig(image=ImageConfig(crop_size=126, margin=2)), TOKENIZER)


def test_empty_answers_are_refused_and_named():
    """Alone or among other branches: nobody answers with nothing, so it is a fault of the data."""
    for annotations in ([{**QA, "answer": ""}], [QA, {**QA, "answer": ""}]):
        record = parse_record("s:k", {"json": json.dumps({"annotations": annotations}).encode()})
        with pytest.raises(BadRecord, match="record s:k: .*empty answer") as caught:
            builder().build(record, np.random.default_rng(0))
        assert caught.value.cause == "bad annotation"


# --- memory ---------------------------------------------------------------------------------------------------------

READ_ALL = """
import resource, sys
import torch
torch.set_num_threads(1)
from molmo2_nemo.data.config import DataConfig, ImageConfig, PackingConfig, SourceConfig, VideoConfig
from molmo2_nemo.data.reader import ExampleReader, Skipped, default_builder
config = DataConfig(
    sources={"set": SourceConfig(sys.argv[1])}, image=ImageConfig(crop_size=126, margin=2, max_crops=2),
    video=VideoConfig(max_frames=8), packing=PackingConfig(sequence_length=512, max_crops=16),
)
reader = ExampleReader(config, *default_builder(config))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
skipped = sum(isinstance(reader[n], Skipped) for n in range(int(sys.argv[2])))
print(skipped, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_small(tmp_path):
    """Records that would need gigabytes if they were believed; the process may grow by 600 MB (text alone is 100)."""
    picture = {"images": ["0.png"], "annotations": [QA]}
    small = io.BytesIO()
    Image.new("1", (1, 1)).save(small, "PNG")
    size = struct.pack(">II", 50_000, 50_000)
    huge = bytearray(small.getvalue())
    huge[16:24] = size
    huge[29:33] = struct.pack(">I", zlib.crc32(bytes(huge[12:29])))
    records = [
        ("huge", {"json": json.dumps(picture).encode(), "0.png": bytes(huge)}),
        ("text", {"json": json.dumps({"annotations": [{**QA, "answer": "word " * 20_000_000}]}).encode()}),
        ("hours", {"json": json.dumps({"video": "mp4", "annotations": [QA]}).encode(), "mp4": clip([0, 3600, 36000])}),
        ("branches", {"json": json.dumps({"annotations": [{**QA, "answer": "x" * 500}] * 2000}).encode()}),
    ]
    write_shards(tmp_path / "set", records)
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "set"), str(len(records))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    skipped, grown = map(int, done.stdout.split())
    assert skipped == 3 and grown < 600 * 1024, (skipped, grown)
