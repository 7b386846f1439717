"""Decoding chosen frames of films by each decoder, against a plain loop and the ffmpeg program, on one core.

    python -m benchmarks.video [--rounds 5] [--seconds 20] [--out benchmarks/results/video-DATE.json]

Films made of the demo's clip, H.264 with B frames: `web`, 1280 x 720 with a key frame every 250 frames, and `long`,
1920 x 1080 with one every 600. Of each: `sequential`, every frame; `sampled`, two a second as in training; `sparse`,
ten spread over the film. All ways give RGB pixels in the order of showing; how many values differ from the plain loop's
is counted.

pyav, torchcodec   data.video.decoder: scanning the packets, then the chosen frames
plain              PyAV: every frame up to the last chosen one is decoded, the chosen ones become RGB
ffmpeg             the ffmpeg program with one thread, its `select` filter, raw RGB into a pipe

Ways run in turn, in rounds; times are processor time, of the program with its start. What is not installed is said.
"""

from __future__ import annotations

import argparse
import io
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from benchmarks.report import machine, write_result
from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.video.decoders import frames_of
from molmo2_nemo.data.video.film import look_at
from molmo2_nemo.data.video.frames_torchcodec import problem

MEDIA = Path(__file__).parents[1] / "data_prep" / "demo_media"
FPS = 30
FILMS = {"web": ((1280, 720), 250), "long": ((1920, 1080), 600)}  # size, frames from key to key
LIMITS = LimitsConfig()
Way = Callable[[Path, np.ndarray], list[np.ndarray]]


def make_film(size: tuple[int, int], gop: int, seconds: float) -> bytes:
    """The demo's clip, forwards and backwards, so that nothing but the start is a new scene."""
    with av.open(str(MEDIA / "bunny.mp4")) as source:
        frames = [f.reformat(*size, format="yuv420p").to_ndarray() for f in source.decode(video=0)]
    frames += frames[-2:0:-1]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        options = {"preset": "veryfast", "bf": "3", "threads": "1", "sc_threshold": "0", "g": str(gop)}
        stream = out.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(round(seconds * FPS)):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frames[i % len(frames)], format="yuv420p")))
        out.mux(stream.encode(None))
    return file.getvalue()


def choices(count: int) -> dict[str, np.ndarray]:
    """Numbers of the frames that are wanted of a film with `count` frames."""
    sparse = np.unique(np.linspace(0, count - 1, 10).round().astype(np.int64))
    return {"sequential": np.arange(count), "sampled": np.arange(0, count, FPS // 2), "sparse": sparse}


def by_decoder(name: str) -> Way:
    def read(path: Path, wanted: np.ndarray) -> list[np.ndarray]:
        data = path.read_bytes()
        reader = frames_of(name, data, look_at(data, LIMITS), LIMITS)
        pixels = keep(reader.frames(wanted))
        assert reader.used == name, f"{reader.used} read the film instead of {name}"
        return pixels

    return read


def plain(path: Path, wanted: np.ndarray) -> list[np.ndarray]:
    def shown() -> Any:
        chosen = set(wanted.tolist())
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in chosen:
                    yield frame.to_ndarray(format="rgb24")
                if number >= wanted[-1]:
                    return

    return keep(shown())


def ffmpeg(path: Path, wanted: np.ndarray) -> list[np.ndarray]:
    every = np.unique(np.diff(wanted))
    step = f"not(mod(n,{every[0]}))*lte(n,{wanted[-1]})"
    chosen = step if len(every) == 1 else "+".join(f"eq(n,{n})" for n in wanted.tolist())
    command = ["ffmpeg", "-loglevel", "error", "-threads", "1", "-i", str(path), "-vf", f"select='{chosen}'"]
    command += ["-vsync", "passthrough", "-threads", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        shape = context.height, context.width, 3

    def read() -> Any:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
            assert program.stdout is not None
            while content := program.stdout.read(shape[0] * shape[1] * 3):
                yield np.frombuffer(content, np.uint8).reshape(shape)

    return keep(read())


def keep(frames: Any) -> list[np.ndarray]:
    """A sixteenth of every frame, so that a film of them fits into memory."""
    return [pixels[::4, ::4].copy() for pixels in frames]


def ways() -> tuple[dict[str, Way], dict[str, str]]:
    """The ways that can run here, and why the others cannot."""
    found: dict[str, Way] = {"pyav": by_decoder("pyav"), "plain": plain}
    missing = {}
    reason = problem("cpu")
    if reason is None:
        found["torchcodec"] = by_decoder("torchcodec")
    else:
        missing["torchcodec"] = reason
    if shutil.which("ffmpeg"):
        found["ffmpeg"] = ffmpeg
    else:
        missing["ffmpeg"] = "the program is not installed"
    return found, missing


def processor_seconds() -> float:
    """Of this process and of the programs that it started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


def measure(path: Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each choice of frames and way."""
    rows, (found, _) = [], ways()
    for pattern, wanted in choices(len(look_at(path, LIMITS).index.pts)).items():
        seconds: dict[str, list[float]] = {name: [] for name in found}
        seen: dict[str, np.ndarray] = {}
        for _ in range(rounds):
            for name, way in found.items():
                began = processor_seconds()
                pixels = way(path, wanted)
                seconds[name].append(processor_seconds() - began)
                assert len(pixels) == len(wanted), f"{name} gave {len(pixels)} frames for {len(wanted)}"
                seen[name] = np.stack(pixels)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        for name in found:
            rows.append(
                {
                    "frames": pattern,
                    "way": name,
                    "wanted": len(wanted),
                    "frames_per_second": round(len(wanted) / middle[name], 2),
                    "times_plain": round(middle["plain"] / middle[name], 3),
                    "times_ffmpeg": round(middle["ffmpeg"] / middle[name], 3) if "ffmpeg" in middle else None,
                    "values_unlike_plain": int((seen[name] != seen["plain"]).sum()),
                    "seconds": [round(v, 4) for v in seconds[name]],
                }
            )
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.video", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="length of each film")
    parser.add_argument("--scale", type=int, default=1, help="divides the films' sides, for a quick look")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/video-<date>.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "libraries": libraries(), "cannot_run": ways()[1], "films": {}}
    result["settings"] = {"rounds": args.rounds, "seconds": args.seconds, "fps": FPS, "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, gop) in FILMS.items():
            path = Path(folder) / f"{name}.mp4"
            width, height = (side // args.scale // 2 * 2 for side in size)
            path.write_bytes(make_film((width, height), gop, args.seconds))
            rows = measure(path, args.rounds)
            result["films"][name] = {"size": [width, height], "gop": gop, "bytes": path.stat().st_size, "rows": rows}
            for row in rows:
                print(
                    f"{name:5} {row['frames']:10} {row['way']:10} {row['frames_per_second']:8.1f} frames/s, "
                    f"{row['times_plain']:.2f} times plain, {row['times_ffmpeg'] or float('nan'):.2f} times ffmpeg",
                    flush=True,
                )
    write_result("video", result, args.out)
    return result


def libraries() -> dict[str, Any]:
    """Versions that matter beside those of `machine`."""
    found: dict[str, Any] = {"pyav": av.__version__, "pyav_libavcodec": av.library_versions["libavcodec"]}
    if problem("cpu") is None:
        import torchcodec

        found["torchcodec"] = torchcodec.__version__
    if shutil.which("ffmpeg"):
        said = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
        found["ffmpeg"] = said.split()[2]
    return found


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
