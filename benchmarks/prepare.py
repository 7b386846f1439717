"""Preparing shards against a plain loop with `tarfile`, and the memory of a long run.

    python -m benchmarks.prepare [--repeats 3] [--records 100000] [--out benchmarks/results/prepare-DATE.json]

Pictures: the demo's photographs enlarged to camera sizes, JPEG. Videos: 10 seconds of the demo's clip at 1280 x 720,
H.264. One question about each, from a JSONL file.

ours          `molmo2 prepare`: every picture decoded (at an eighth of its size), every video scanned and its first
              frame decoded; checked records, manifest with measures and checksums, resumable; one process
plain copy    read the file, write its bytes and a JSON member with `tarfile`: nothing is looked at
plain look    the same, but pictures are decoded with Pillow and the frames of videos are counted by decoding them,
              which is the plain way to know that a file is whole and how long it lasts

Figures are items per second of processor time, so that other work on the machine counts little: medians over repeats,
ratios of paired repeats. The long run writes small records with a tiny picture each in one worker process, once with a
tenth of the records, and compares the peak resident memory of both processes.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import av
from PIL import Image

from benchmarks.report import machine, write_result
from data_prep.demo import MEDIA
from data_prep.prepare import Options, prepare, prepare_own
from data_prep.sources.base import Context, Inline, Manual, Row, Sample, Source
from data_prep.sources.shapes import qa
from molmo2_nemo.data.shards import ShardDataset

PICTURES, VIDEOS = 60, 8
PICTURE_SIZES = [(1280, 960), (1920, 1080), (1024, 768), (800, 1200)]
VIDEO_SIZE, VIDEO_FPS, VIDEO_SECONDS = (1280, 720), 30, 10
SHARE = 10  # the short run has this part of the long run's records


def make_raw(folder: Path) -> tuple[Path, Path]:
    """JSONL files of pictures and of videos, with the media beside them."""
    photos = sorted(MEDIA.glob("*.jpg"))
    lines = []
    for i in range(PICTURES):
        size = PICTURE_SIZES[i % len(PICTURE_SIZES)]
        name = f"p{i:04d}.jpg"
        Image.open(photos[i % len(photos)]).convert("RGB").resize(size).save(folder / name, quality=90)
        lines.append({"image": name, "question": f"What is in picture {i}?", "answer": "That can be seen. " * 6})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    film = make_video()
    lines = []
    for i in range(VIDEOS):
        (folder / f"v{i:04d}.mp4").write_bytes(film)
        lines.append({"video": f"v{i:04d}.mp4", "question": f"What is in video {i}?", "answer": "A rabbit. " * 6})
    (folder / "videos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pictures.jsonl", folder / "videos.jsonl"


def make_video() -> bytes:
    with av.open(str(MEDIA / "bunny.mp4")) as source:
        frames = [f.reformat(*VIDEO_SIZE, format="yuv420p").to_ndarray() for f in source.decode(video=0)]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=VIDEO_FPS, options={"preset": "veryfast", "g": "250", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = *VIDEO_SIZE, "yuv420p"
        for i in range(VIDEO_SECONDS * VIDEO_FPS):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frames[i % len(frames)], format="yuv420p")))
        out.mux(stream.encode())
    return file.getvalue()


def ours(jsonl: Path, out: Path) -> int:
    prepare_own(jsonl, out / "set", Options(cache=out / "cache", strict=True))
    return len(ShardDataset(out / "set"))


def plain(jsonl: Path, out: Path, look: Callable[[bytes], Any]) -> int:
    count = 0
    out.mkdir()
    with tarfile.open(out / "set.tar", "w") as tar:
        for line in jsonl.read_text().splitlines():
            entry = json.loads(line)
            name = entry.get("image") or entry["video"]
            data = (jsonl.parent / name).read_bytes()
            look(data)
            text = {"annotations": [{"style": "user_qa", "question": entry["question"], "answer": entry["answer"]}]}
            for suffix, content in (("json", json.dumps(text).encode()), (Path(name).suffix[1:], data)):
                info = tarfile.TarInfo(f"{count:08d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            count += 1
    return count


def look_at_picture(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.load()


def look_at_video(data: bytes) -> None:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        sum(1 for _ in container.decode(stream))


def measure(jsonl: Path, look: Callable[[bytes], Any], repeats: int, scratch: Path) -> dict[str, Any]:
    """Items per second of processor time of the three ways, interleaved."""
    ways: dict[str, Callable[[Path], int]] = {
        "ours": lambda out: ours(jsonl, out),
        "plain copy": lambda out: plain(jsonl, out, lambda _: None),
        "plain look": lambda out: plain(jsonl, out, look),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first warms caches and imports
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                began = time.process_time()
                count = way(Path(folder) / "out")
                spent = time.process_time() - began
            if repeat:
                rates[name].append(count / spent)
    result: dict[str, Any] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    for name in ("plain copy", "plain look"):
        ratios = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
        result[f"ours to {name}"] = round(statistics.median(ratios), 3)
    return result


# --- the long run ----------------------------------------------------------------------------------------------------


def small_records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample]:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 30)).save(file, "PNG")
    for row in rows:
        yield Sample(f"{row['n']:08d}", [qa(f"What is number {row['n']}?", "green")], images=[Inline(file.getvalue())])


def long_run(count: int) -> None:
    """In a process of its own: prints seconds, records, and the peak memory of this process and its worker, bytes."""
    source = Source("small", {}, "pictures", Manual("nothing", ()), "none", {"n": int}, small_records)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder), time.perf_counter()
        rows = lambda: ({"n": n} for n in range(count))  # noqa: E731
        head = prepare(source, out / "small", Options(workers=1, cache=out / "cache"), rows=rows).head
        seconds = time.perf_counter() - began
        work = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(
            json.dumps(
                {
                    "records": head["records"],
                    "shards": len(head["shards"]),
                    "seconds": round(seconds, 1),
                    "records_per_processor_second": round(count / work, 1),
                    "peak_mb_main": round(peak_kb() / 1024, 1),
                    "peak_mb_worker": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
                }
            )
        )


def peak_kb() -> int:
    """Peak resident memory of this process. Not ru_maxrss: that begins with what the parent had when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def run_long(count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.prepare", "--long-run", str(count)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return dict(json.loads(out.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=int, default=100_000, help="of the long run; 0 = none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--long-run", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.long_run:
        long_run(args.long_run)
        return 0
    result: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        pictures, videos = make_raw(Path(folder))
        result["pictures_per_core_second"] = measure(pictures, look_at_picture, args.repeats, Path(folder))
        result["videos_per_core_second"] = measure(videos, look_at_video, args.repeats, Path(folder))
    result["pictures"] = {"count": PICTURES, "sizes": PICTURE_SIZES}
    result["videos"] = {"count": VIDEOS, "size": VIDEO_SIZE, "fps": VIDEO_FPS, "seconds": VIDEO_SECONDS}
    if args.records:
        short, long = run_long(args.records // SHARE), run_long(args.records)
        result["long_run"] = {"short": short, "long": long}
        for who in ("main", "worker"):
            result["long_run"][f"peak_{who}_long_to_short"] = round(long[f"peak_mb_{who}"] / short[f"peak_mb_{who}"], 3)
    print(json.dumps(result, indent=1))
    write_result("prepare", result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
