"""Decoding and preparing examples against the plain way, on one core, with the share of each step.

    python -m benchmarks.loader [--seconds 20] [--out benchmarks/results/loader-DATE.json]

Pictures (the demo's photographs, enlarged to camera sizes, JPEG) and videos (the demo's clip, repeated to a minute of
1280 x 720, H.264) with published settings: 378-pixel crops, 8 tiles, 2 frames a second, 128 frames. With trees all
ways give the same arrays, which is checked.

ours        the training path: ShardDataset, parse_record, ExampleBuilder
plain       every frame of a video decoded to RGB, then the sampled ones picked and resized; pictures with Pillow as
            they come; no index, every record found by reading its tar; no reuse: each question is an example of its
            own and decodes its picture or video again (QUESTIONS of them)
plain tree  the same, but the questions about one picture or video share its decoding

Times are processor time, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

import molmo2_nemo.data.build as build
import molmo2_nemo.data.image as image_module
from benchmarks.report import machine, write_result
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video import film as film_module
from molmo2_nemo.data.video import read as video_module
from molmo2_nemo.data.video.sampling import TimeSampler

MEDIA = Path(__file__).parents[1] / "data_prep" / "demo_media"
PICTURE_SIZES = [(1280, 960), (1920, 1080), (1024, 768), (800, 1200)]
QUESTIONS = 3  # about each picture and video
VIDEO_SIZE, VIDEO_FPS, VIDEO_SECONDS = (1280, 720), 30, 60


def make_video() -> bytes:
    """A minute of the demo's clip at 720p, encoded as web videos are: key frame every 250, B frames."""
    with av.open(str(MEDIA / "bunny.mp4")) as source:
        frames = [f.reformat(*VIDEO_SIZE, format="yuv420p").to_ndarray() for f in source.decode(video=0)]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        options = {"preset": "veryfast", "g": "250", "bf": "3", "threads": "1"}
        stream = out.add_stream("libx264", rate=VIDEO_FPS, options=options)
        stream.width, stream.height = VIDEO_SIZE
        stream.pix_fmt = "yuv420p"
        for i in range(VIDEO_SECONDS * VIDEO_FPS):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frames[i % len(frames)], format="yuv420p")))
        out.mux(stream.encode())
    return file.getvalue()


def make_data(folder: Path) -> tuple[Path, Path]:
    """One data set of pictures, one of videos."""
    pictures = []
    for i, path in enumerate(sorted(MEDIA.glob("*.jpg"))):
        file = io.BytesIO()
        Image.open(path).convert("RGB").resize(PICTURE_SIZES[i % len(PICTURE_SIZES)]).save(file, "JPEG", quality=90)
        data = {"images": ["jpg"], "annotations": questions()}
        pictures.append((path.stem, {"json": json.dumps(data).encode(), "jpg": file.getvalue()}))
    write_shards(folder / "pictures", pictures)
    data = {"video": "mp4", "annotations": questions()}
    write_shards(folder / "videos", [("bunny", {"json": json.dumps(data).encode(), "mp4": make_video()})])
    return folder / "pictures", folder / "videos"


def questions() -> list[dict[str, Any]]:
    asked = ("What is this?", "What happens here?", "Which colours are there?")[:QUESTIONS]
    return [{"style": "user_qa", "question": text, "answer": "As one can see, a great deal. " * 6} for text in asked]


class Clock:
    """Seconds by step; inner steps are taken off the outer one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[float] = []

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            self._open.append(0.0)
            began = time.process_time()
            try:
                return function(*args, **options)
            finally:
                spent = time.process_time() - began
                self.seconds[name] += spent - self._open.pop()
                if self._open:
                    self._open[-1] += spent

        return timed


def plain_picture(data: bytes, **_: Any) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def plain_video(source: bytes, config: VideoConfig, *, side: int, **_: Any) -> video_module.SampledVideo:
    """Decode every frame to RGB, then pick."""
    with av.open(io.BytesIO(source)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        rate = float(stream.average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    duration = len(frames) / rate
    times = TimeSampler.of(config, {}, rate)(duration)
    picked = np.clip((np.minimum(times, duration - 1e-6) * rate + 1e-6).astype(int), 0, len(frames) - 1)
    small = np.stack([image_module.resize(frames[i], side, side) for i in picked])
    size = (frames[0].shape[1], frames[0].shape[0])
    return video_module.SampledVideo(small, times, size, duration, rate, video_module.Decoding(len(frames), 0, "pyav"))


def plain_read(folder: Path, index: int) -> tuple[str, dict[str, bytes]]:
    """The record with this number, by reading the tar from its start."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if key not in found and len(found) > index:
                    break
                file = tar.extractfile(member)
                found.setdefault(key, {})[suffix] = file.read() if file else b""
    key = list(found)[index]
    return key, found[key]


def measure(folder: Path, config: DataConfig, way: str, seconds: float) -> tuple[dict[str, Any], list[Any]]:
    """Records built in the time given (at least one round), and the first examples of each record."""
    plain = way != "ours"
    clock, dataset = Clock(), ShardDataset(folder)
    builder = ExampleBuilder(config, Molmo2Tokenizer.load("tiny"))
    replaced = [
        (build, "decode_image", "decode pictures", plain_picture if plain else build.decode_image),
        (build, "read_video", "decode videos", plain_video if plain else build.read_video),
        (build, "encode_images", "tiles, patches, pooling", build.encode_images),
        (build, "encode_video", "tiles, patches, pooling", build.encode_video),
        (build, "flatten", "tree", build.flatten),
        (image_module, "resize", "resize", image_module.resize),
        (video_module, "resize", "resize", video_module.resize),
        (film_module, "scan", "scan packets", film_module.scan),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _, _ in replaced]
    read = clock.wrap("read", (lambda i: plain_read(folder, i)) if plain else dataset.read)
    parse, make = clock.wrap("parse", parse_record), clock.wrap("text and rest", builder.build)
    examples: list[Any] = []
    count = crops = 0
    try:
        for module, name, step, function in replaced:
            setattr(module, name, clock.wrap(step, function))
        began = time.process_time()
        while count < len(dataset) or time.process_time() - began < seconds:
            key, members = read(count % len(dataset))
            record = parse(key, members)
            parts = [[note] for note in record.annotations] if way == "plain" else [record.annotations]
            for part in parts:
                record.annotations = part
                example = make(record, np.random.default_rng(count % len(dataset)), max_tokens=16384)
                if count < len(dataset):
                    examples.append(example)
            count += 1
            crops += example.num_crops  # of the record, once
        spent = time.process_time() - began
    finally:
        for module, name, function in before:
            setattr(module, name, function)
    shares = {name: round(value / spent, 3) for name, value in clock.seconds.most_common()}
    return {"samples_per_second": count / spent, "crops_per_second": crops / spent, "shares": shares}, examples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="for each way and kind of data")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/loader-<date>.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = DataConfig(image=ImageConfig(), video=VideoConfig())
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, path in zip(("pictures", "videos"), make_data(Path(folder)), strict=True):
            built = {}
            for way in ("plain", "plain tree", "ours"):
                results[f"{kind} {way}"], built[way] = measure(path, config, way, args.seconds)
            for a, b in zip(built["plain tree"], built["ours"], strict=True):
                assert np.array_equal(a.input_ids, b.input_ids), "the two ways differ"
                assert np.array_equal(a.crops, b.crops), "the two ways differ"
            new, unit = results[f"{kind} ours"], "sampled frames" if kind == "videos" else "crops"
            for way in ("plain", "plain tree"):
                new[f"times {way}"] = new["samples_per_second"] / results[f"{kind} {way}"]["samples_per_second"]
            print(
                f"{kind}: {new['samples_per_second']:.2f} samples/s, {new['crops_per_second']:.1f} {unit}/s on a core, "
                f"{new['times plain']:.2f} times plain, {new['times plain tree']:.2f} times plain with trees\n"
                f"  {new['shares']}",
                flush=True,
            )
    settings: dict[str, Any] = {"picture_sizes": PICTURE_SIZES, "video": [*VIDEO_SIZE, VIDEO_FPS, VIDEO_SECONDS]}
    settings |= {"questions": QUESTIONS, "threads": 1}
    write_result("loader", {"machine": machine(), "settings": settings, "results": results}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
