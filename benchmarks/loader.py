"""Decoding and preparing examples on one core: against the plain way, and against the way pixels went before.

    python -m benchmarks.loader [--seconds 20] [--rounds 3] [--out benchmarks/results/loader-DATE.json]

Pictures (the demo's photographs, enlarged to camera sizes, JPEG) and films (the demo's clip, repeated; H.264 of
1280 x 720 and 480 x 270, at 30 frames a second and as copies of 2) with published settings: 378-pixel crops, 8 tiles,
2 frames a second; 128 frames of 720p, 384 of 270p. All ways give the same arrays, which is checked.

ours        the training path: ShardDataset, parse_record, ExampleBuilder
before      the same, but pixels are taken from Pillow, stretched and put in the order of patches as at commit 5dc457a,
            whose functions are repeated here: channels first after stretching, conversions outside the part that runs
            on one thread, crops and pictures copied several times
old         the training path of another checkout (--old), in a process of its own
plain       every frame of a video decoded to RGB, then the sampled ones picked and resized; pictures with Pillow as
            they come; no index, every record found by reading its tar; no reuse: each question is an example of its
            own and decodes its picture or video again (QUESTIONS of them)
plain tree  the same, but the questions about one picture or video share its decoding

Ways run in turn, in rounds; medians. Times are processor time of all threads, so that other work on the machine counts
little. `ours` and `before` run on one thread, as in workers, and with torch's own number of them, as in a process that
decodes for itself. Memory is measured by benchmarks/loader_memory.py.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

import molmo2_nemo.data.build as build
import molmo2_nemo.data.image as image_module
import molmo2_nemo.data.video.read as video_module
from benchmarks.report import commit, machine, write_result
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, LimitsConfig, VideoConfig
from molmo2_nemo.data.image import TileGeometry
from molmo2_nemo.data.picture_decoder import opened
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.read import Decoding, VideoPlan

MEDIA = Path(__file__).parents[1] / "data_prep" / "demo_media"
PICTURE_SIZES = [(1280, 960), (1920, 1080), (1024, 768), (800, 1200)]
QUESTIONS = 3  # about each picture and video
FILMS = {  # size, frames a second, sampled frames, which are spread over half as many seconds
    "720p, 30 a second": ((1280, 720), 30, 128),
    "720p, 2 a second": ((1280, 720), 2, 128),
    "270p, 30 a second": ((480, 270), 30, 384),
    "270p, 2 a second": ((480, 270), 2, 384),
}


def make_video(size: tuple[int, int], fps: int, seconds: float) -> bytes:
    """The demo's clip, encoded as web videos are: key frame every 250, B frames."""
    with av.open(str(MEDIA / "bunny.mp4")) as source:
        frames = [f.reformat(*size, format="yuv420p").to_ndarray() for f in source.decode(video=0)]
    step = max(1, 30 // fps)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        options = {"preset": "veryfast", "g": "250", "bf": "3", "threads": "1"}
        stream = out.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(round(seconds * fps)):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frames[i * step % len(frames)], format="yuv420p")))
        out.mux(stream.encode())
    return file.getvalue()


def make_pictures(folder: Path) -> Path:
    records = []
    for i, path in enumerate(sorted(MEDIA.glob("*.jpg"))):
        file = io.BytesIO()
        Image.open(path).convert("RGB").resize(PICTURE_SIZES[i % len(PICTURE_SIZES)]).save(file, "JPEG", quality=90)
        data = {"images": ["jpg"], "annotations": questions()}
        records.append((path.stem, {"json": json.dumps(data).encode(), "jpg": file.getvalue()}))
    write_shards(folder, records)
    return folder


def make_film(folder: Path, size: tuple[int, int], fps: int, frames: int) -> Path:
    """A data set of one film."""
    data = {"video": "mp4", "annotations": questions()}
    video = make_video(size, fps, (frames - 1) / 2)
    write_shards(folder, [("bunny", {"json": json.dumps(data).encode(), "mp4": video})])
    return folder


def make_data(folder: Path) -> tuple[Path, Path]:
    """One data set of pictures, one of videos."""
    return make_pictures(folder / "pictures"), make_film(folder / "videos", *FILMS["720p, 30 a second"])


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


# --- pixels as they went before ---------------------------------------------------------------------------------------


def resize_before(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    chw = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).unsqueeze(0).float()
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    out = F.interpolate(chw, size=(height, width), mode="bilinear", align_corners=False)
    if threads > 1:
        torch.set_num_threads(threads)
    return out.round_().to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


def patchify_before(crops: np.ndarray, patch: int) -> np.ndarray:
    count, height, width, channels = crops.shape
    split = crops.reshape(count, height // patch, patch, width // patch, patch, channels)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 2, 4, 5)).reshape(count, -1, patch * patch * channels)


def image_before(pixels: np.ndarray, tiling: Any, geometry: TileGeometry, out: np.ndarray) -> None:
    rows, cols = tiling
    side, step = geometry.crop, geometry.window
    canvas = resize_before(pixels, *geometry.canvas((rows, cols)))
    views = [resize_before(pixels, side, side)]
    for row in range(rows):
        for col in range(cols):
            views.append(canvas[row * step : row * step + side, col * step : col * step + side])
    out[...] = patchify_before(np.stack(views), geometry.patch)


def decode_before(data: bytes, *, limits: LimitsConfig, **_: Any) -> np.ndarray:
    with opened(io.BytesIO(data), limits) as image:
        image.load()
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def video_before(source: Any, plan: VideoPlan, geometry: TileGeometry, out: np.ndarray, **options: Any) -> Decoding:
    side = geometry.crop
    frames = np.empty((len(plan.times), side, side, 3), np.uint8)
    done = video_module._decode(
        source, plan, frames, lambda p: resize_before(p, side, side), options["decoder"], options["limits"]
    )
    out[...] = patchify_before(frames, geometry.patch)
    return done


# --- the plain way ----------------------------------------------------------------------------------------------------


def plain_picture(data: bytes, **_: Any) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def plain_video(source: Any, plan: VideoPlan, geometry: TileGeometry, out: np.ndarray, **_: Any) -> Decoding:
    """Decode every frame to RGB, then pick."""
    with av.open(io.BytesIO(source)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        rate = float(stream.average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    duration = len(frames) / rate
    picked = np.clip((np.minimum(plan.times, duration - 1e-6) * rate + 1e-6).astype(int), 0, len(frames) - 1)
    small = np.stack([resize_before(frames[i], geometry.crop, geometry.crop) for i in picked])
    out[...] = patchify_before(small, geometry.patch)
    return Decoding(len(frames), 0, "plain")


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


# --- measuring --------------------------------------------------------------------------------------------------------


@contextmanager
def steps_of(way: str, clock: Clock) -> Iterator[None]:
    """The steps of a way put in place of ours, and timed."""
    plain = way.startswith("plain")
    video = plain_video if plain else video_before if way == "before" else build.decode_crops
    picture = plain_picture if plain else decode_before if way == "before" else build.decode_image
    steps: list[tuple[Any, str, str, Callable[..., Any]]] = [
        (build, "image_size", "plan", build.image_size),
        (build, "images_layout", "plan", build.images_layout),
        (build, "plan_video", "plan", build.plan_video),
        (build, "video_layout", "plan", build.video_layout),
        (build, "flatten", "tree", build.flatten),
        (build, "decode_image", "decode pictures", picture),
        (build, "decode_crops", "decode videos", video),
        (build, "image_crops", "tiles", build.image_crops if way == "ours" else image_before),
        (image_module, "resizes", "resize", image_module.resizes),
        (image_module, "patchify", "patches", image_module.patchify),
        (video_module, "resize", "resize", video_module.resize),
        (video_module, "patchify", "patches", video_module.patchify),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _, _ in steps]
    own = {"resize_before": resize_before, "patchify_before": patchify_before}
    try:
        for module, name, step, function in steps:
            setattr(module, name, clock.wrap(step, function))
        globals()["resize_before"] = clock.wrap("resize", resize_before)
        globals()["patchify_before"] = clock.wrap("patches", patchify_before)
        yield
    finally:
        globals().update(own)
        for module, name, function in before:
            setattr(module, name, function)


def measure(folder: Path, config: DataConfig, way: str, seconds: float) -> tuple[dict[str, Any], list[Any]]:
    """Records built in the time given (at least one round), and the first examples of each record."""
    plain = way.startswith("plain")
    clock, dataset = Clock(), ShardDataset(folder)
    builder = ExampleBuilder(config, Molmo2Tokenizer.load("tiny"))
    read = clock.wrap("read", (lambda i: plain_read(folder, i)) if plain else dataset.read)
    parse, make = clock.wrap("parse", parse_record), clock.wrap("text and rest", builder.build)
    examples: list[Any] = []
    count = crops = 0
    with steps_of(way, clock):
        began = time.process_time()
        while count < len(dataset) or time.process_time() - began < seconds:
            key, members = read(count % len(dataset))
            record = parse(key, members)
            parts = [[note] for note in record.annotations] if way == "plain" else [record.annotations]
            for part in parts:
                record.annotations = part
                example = make(record, np.random.default_rng(count % len(dataset)), max_tokens=65536)
                if count < len(dataset):
                    examples.append(example)
            count += 1
            crops += example.num_crops  # of the record, once
        spent = time.process_time() - began
    shares = {name: round(value / spent, 3) for name, value in clock.seconds.most_common()}
    return {"samples_per_second": count / spent, "crops_per_second": crops / spent, "shares": shares}, examples


CHILD = """
import hashlib, json, sys, time
import numpy as np, torch
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
torch.set_num_threads(1)
config = DataConfig(image=ImageConfig(), video=VideoConfig(max_frames=int(sys.argv[2])))
dataset, builder = ShardDataset(sys.argv[1]), ExampleBuilder(config, Molmo2Tokenizer.load("tiny"))
hashes, count, crops, began = [], 0, 0, time.process_time()
while count < len(dataset) or time.process_time() - began < float(sys.argv[3]):
    i = count % len(dataset)
    example = builder.build(parse_record(*dataset.read(i)), np.random.default_rng(i), max_tokens=65536)
    hashes += [hashlib.sha1(example.crops).hexdigest()] if count < len(dataset) else []
    count, crops = count + 1, crops + example.num_crops
spent = time.process_time() - began
print(json.dumps({"samples_per_second": count / spent, "crops_per_second": crops / spent, "hashes": hashes}))
"""


def measure_in(checkout: Path, folder: Path, frames: int, seconds: float) -> dict[str, Any]:
    """The training path of another checkout, on one thread, in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(folder), str(frames), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=checkout, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(
    path: Path, config: DataConfig, rounds: int, seconds: float, threads: int, old: Path | None = None
) -> dict[str, Any]:
    """All ways on one data set, in rounds; ratios are medians over rounds."""
    ways = ["plain", "plain tree", "before", "ours"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        built = {}
        for way in ways:
            found, built[way] = measure(path, config, way, seconds)
            runs.setdefault(way, []).append(found)
        if old is not None:
            found = measure_in(old, path, config.video.max_frames, seconds)
            hashes = [hashlib.sha1(example.crops).hexdigest() for example in built["ours"]]
            assert found.pop("hashes") == hashes, f"{old} gives other pixels"
            runs.setdefault("old", []).append({**found, "shares": {}})
        for way in ("plain tree", "before"):
            for a, b in zip(built[way], built["ours"], strict=True):
                assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.crops, b.crops), f"{way} differs"
        if threads > 1:
            torch.set_num_threads(threads)
            for way in ("before", "ours"):
                runs.setdefault(f"{way}, {threads} threads", []).append(measure(path, config, way, seconds)[0])
            torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for way, found in runs.items():
        speeds = [run["samples_per_second"] for run in found]
        ours = runs["ours" if way in [*ways, "old"] else f"ours, {threads} threads"]
        result[way] = {
            "samples_per_second": statistics.median(speeds),
            "crops_per_second": statistics.median(run["crops_per_second"] for run in found),
            "ours_is_faster": statistics.median(a["samples_per_second"] / b for a, b in zip(ours, speeds, strict=True)),
            "shares": found[-1]["shares"],
        }
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="for each way, kind of data and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--old", type=Path, help="another checkout, whose training path is measured in turn")
    parser.add_argument("--scale", type=int, default=1, help="divide the number of frames by this, for a trial")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/loader-<date>.json")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            sets = {"pictures": (make_pictures(Path(folder) / "pictures"), 128)}
            for name, (size, fps, frames) in FILMS.items():
                count = frames // args.scale
                sets[name] = (make_film(Path(folder) / name.replace(", ", "-"), size, fps, count), count)
            for kind, (path, frames) in sets.items():
                config = DataConfig(image=ImageConfig(), video=VideoConfig(max_frames=frames))
                results[kind] = compare(path, config, args.rounds, args.seconds, threads, args.old)
                _print(kind, results[kind])
    finally:
        torch.set_num_threads(threads)
    settings: dict[str, Any] = {"picture_sizes": PICTURE_SIZES, "films": FILMS, "questions": QUESTIONS}
    settings |= {
        "rounds": args.rounds,
        "seconds": args.seconds,
        "threads": threads,
        "old": args.old and commit(args.old),
    }
    result = {"machine": machine(), "settings": settings, "results": results}
    write_result("loader", result, args.out)
    return result


def _print(kind: str, found: dict[str, Any]) -> None:
    ours = found["ours"]
    times = ", ".join(f"{row['ours_is_faster']:.2f} times {way}" for way, row in found.items() if "ours" not in way)
    print(f"{kind}: {ours['crops_per_second']:.1f} crops/s on a core, {times}\n  {ours['shares']}", flush=True)


if __name__ == "__main__":
    main()
    sys.exit(0)
