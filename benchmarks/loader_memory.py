"""Host memory of the reader of one replica at stage 3, in the worst case: every record a film of 384 frames.

    python -m benchmarks.loader_memory [--workers 0 6 12] [--out benchmarks/results/loader_memory-DATE.json]

One film (480 x 270, 2 frames a second) is the whole data set, with the packs of stage 3: 36,864 tokens, 384 crops, 48
waiting examples.

ours    PackStream, with the numbers of workers given: 10 packs, with a pause after each in which workers read ahead
window  the same packs in order of cost, 8 at a time (data.packing.balance_window)
held    what waits holds its crops: the same packer over examples that are decoded before they are packed, in one
        process without workers, until the first 2 packs are there. (It is written here; at commit 682c472 the loader
        did this, and its workers held up to `num_workers * prefetch` further examples.)

Each way runs in processes of its own. Memory is the proportional set size (PSS) of all of them together, sampled every
0.05 s; the highest sample counts, and that of the same process before it opens the data is given beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.report import machine, write_result

MIB = 2**20


def config_of(folder: str, frames: int, length: int, buffer: int, workers: int) -> Any:
    from molmo2_nemo.data.config import DataConfig, PackingConfig, SourceConfig, VideoConfig

    return DataConfig(
        sources={"films": SourceConfig(folder)},
        video=VideoConfig(max_frames=frames),
        packing=PackingConfig(sequence_length=length, max_crops=frames, buffer_size=buffer),
        num_workers=workers,
    )


def tree_of(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for process in found:
        try:
            for task in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:  # it has ended
            continue
    return found


def memory(pid: int) -> int:
    """PSS of a process and its descendants, bytes."""
    total = 0
    for process in tree_of(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


class Highest:
    """The highest sample while it runs."""

    def __init__(self) -> None:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.bytes = max(self.bytes, memory(os.getpid()))

    def __enter__(self) -> Highest:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()


def child(way: str, folder: str, frames: int, length: int, buffer: int, workers: int, pause: float) -> dict[str, Any]:
    import torch

    from molmo2_nemo.data.balance import CostModel
    from molmo2_nemo.data.collate import collate
    from molmo2_nemo.data.loader import PackStream
    from molmo2_nemo.data.ordering import CostOrder
    from molmo2_nemo.data.packing import Item
    from molmo2_nemo.data.planner import new_packer

    torch.set_num_threads(1)
    config = config_of(folder, frames, length, buffer, workers)
    stream = PackStream(config, micro_batch_size=1, dp_rank=0, dp_size=1)
    before, packs = memory(os.getpid()), 0
    with Highest() as highest:
        if way != "held":
            for batch in itertools.islice(CostOrder(stream, 8, CostModel()) if way == "window" else stream, 10):
                assert len(batch.crops) == frames
                packs += 1
                time.sleep(pause)
            waiting = len(stream.place.waiting)
        else:
            packer, reader = new_packer(config.packing), stream.reader
            for n in itertools.count():
                example = reader[n]
                pack = packer.add(Item(n, example.num_tokens, example.num_crops, example))
                if pack:
                    length = config.packing.sequence_length
                    collate([[i.payload for i in pack]], sequence_length=length, im_patch_id=reader.im_patch_id)
                    packs += 1
                if packs == 2:
                    break
            waiting = len(packer.waiting)
    found = {"before_mib": before / MIB, "highest_mib": highest.bytes / MIB, "waiting": waiting, "packs": packs}
    return {name: round(value, 1) for name, value in found.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 6, 12])
    parser.add_argument("--frames", type=int, default=384)
    parser.add_argument("--length", type=int, default=36864, help="tokens of a pack")
    parser.add_argument("--buffer", type=int, default=48, help="examples that wait")
    parser.add_argument("--pause", type=float, default=3, help="seconds after each pack")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/loader_memory-<date>.json")
    parser.add_argument("--child", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        way, folder, *numbers, pause = args.child
        frames, length, buffer, workers = map(int, numbers)
        print(json.dumps(child(way, folder, frames, length, buffer, workers, float(pause))))
        return {}
    from benchmarks.loader import make_film

    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(make_film(Path(scratch) / "films", (480, 270), 2, args.frames))
        ways = [*((way, workers) for way in ("ours", "window") for workers in args.workers), ("held", 0)]
        for way, workers in ways:
            numbers = [str(v) for v in (args.frames, args.length, args.buffer, workers, args.pause)]
            command = [sys.executable, "-m", "benchmarks.loader_memory", "--child", way, folder, *numbers]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            name = f"{way}, {workers} workers"
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {results[name]}", flush=True)
    settings = {"frames": args.frames, "length": args.length, "buffer": args.buffer, "pause": args.pause}
    result = {"machine": machine(), "settings": settings, "results": results}
    write_result("loader_memory", result, args.out)
    return result


if __name__ == "__main__":
    main()
    sys.exit(0)
