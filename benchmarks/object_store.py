"""Reading from an S3 on this machine without a cache, with an empty and with a full one, against a folder.

    python -m benchmarks.object_store [--records 200] [--packs 16] [--workers 2] [--rounds 7] [--out FILE.json]

`records`: random reads of whole records, a JSON and 100 kB beside it, one after the other in one process. `packs`: the
loader's stream of the demo's pictures and films (126-pixel crops, packs of 2,048 tokens), with worker processes that
start anew in each run.

The server is moto's, in a process of its own on the same cores, of which it takes a share. A real store is far away and
on other machines: these figures say what reading through one costs here, and nothing of latency. All four ways run in
turn, in rounds, and give the same bytes and batches, which is checked. Times are of the clock.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import machine, write_result
from data_prep.demo import build_demo
from data_prep.shard_copy import copy
from molmo2_nemo.data.config import DataConfig, PackingConfig, SourceConfig, StoreConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.objects import traffic
from molmo2_nemo.data.objects.address import Address
from molmo2_nemo.data.objects.files import use
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.shards import ShardDataset

SETS = ("pretrain", "sft")
WAYS = ("folder", "no_cache", "empty_cache", "full_cache")
FAR = Address("s3://bucket")
SERVER = """
import logging
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""


@contextmanager
def s3() -> Iterator[None]:
    """An S3 in another process, and the environment that leads there."""
    import fsspec

    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}",
            "AWS_ACCESS_KEY_ID": "made-up",
            "AWS_SECRET_ACCESS_KEY": "made-up",
            "AWS_DEFAULT_REGION": "us-east-1",
            "no_proxy": "127.0.0.1",
        }
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        try:
            yield
        finally:
            server.terminate()


def make_data(folder: Path, records: int) -> None:
    """The demo's data sets, and one of records of 100 kB."""
    build_demo(folder)
    rng = np.random.default_rng(0)
    made = ((f"{i:05d}", {"json": b"{}", "bin": rng.bytes(100_000)}) for i in range(records))
    write_shards(folder / "records", made, records_per_shard=100)


def read_records(root: str, store: StoreConfig) -> tuple[float, list[Any]]:
    """Seconds of reading every record once, in random order, and the records."""
    use(store)
    dataset = ShardDataset(f"{root}/records")
    order = np.random.default_rng(1).permutation(len(dataset))
    began = time.perf_counter()
    found = [dataset.read(int(i)) for i in order]
    return time.perf_counter() - began, found


def read_packs(root: str, store: StoreConfig, count: int, workers: int) -> tuple[float, list[Any]]:
    """Seconds until `count` batches of the stream are there, and what of them can be compared."""
    config = DataConfig(
        sources={name: SourceConfig(f"{root}/{name}") for name in SETS},
        packing=PackingConfig(2048, 24, 6),
        num_workers=workers,
        store=store,
    )
    config.image.crop_size, config.image.margin, config.image.max_crops, config.video.max_frames = 126, 2, 2, 8
    stream = PackStream(config, micro_batch_size=1, dp_rank=0, dp_size=1)
    began = time.perf_counter()
    batches = iter(stream)
    found = list(itertools.islice(batches, count))
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]
    return seconds, [(b.keys, b.crops.tobytes(), b.input_ids.tobytes(), b.loss_weights.tobytes()) for b in found]


def compare(
    read: Callable[[str, StoreConfig], tuple[float, list[Any]]], folder: Path, scratch: Path, rounds: int
) -> dict[str, Any]:
    """One kind of reading in all four ways."""
    none, kept = (StoreConfig(cache=str(scratch / name), cache_gib=gib) for name, gib in (("none", 0), ("kept", 8)))
    read(FAR.url, none)  # unmeasured: libraries load their parts at first use
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    taken: dict[str, dict[str, int]] = {}
    for _ in range(rounds):
        shutil.rmtree(scratch / "kept", ignore_errors=True)
        expected: list[Any] = []
        for way, root, store in zip(WAYS, (str(folder), *[FAR.url] * 3), (none, none, kept, kept), strict=True):
            traffic.take()
            spent, found = read(root, store)
            taken[way] = traffic.take()
            seconds[way].append(spent / len(found))
            expected = expected or found
            assert found == expected
    ratios = {way: [a / b for a, b in zip(seconds[way], seconds["folder"], strict=True)] for way in WAYS[1:]}
    return {
        "rounds": rounds,
        "median_milliseconds": {way: round(1000 * statistics.median(values), 3) for way, values in seconds.items()},
        "median_ratio_to_folder": {way: round(statistics.median(values), 2) for way, values in ratios.items()},
        "milliseconds": {way: [round(1000 * value, 3) for value in values] for way, values in seconds.items()},
        "taken_from_the_store": taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--packs", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    about = machine()
    packs = functools.partial(read_packs, count=args.packs, workers=args.workers)
    with tempfile.TemporaryDirectory() as name, s3():
        folder, scratch = Path(name) / "data", Path(name) / "caches"
        make_data(folder, args.records)
        for one in (*SETS, "records"):
            copy(folder / one, FAR / one, StoreConfig(cache=str(Path(name) / "copying")))
        result = {
            "records": compare(read_records, folder, scratch, args.rounds),
            "packs": {"workers": args.workers, **compare(packs, folder, scratch, args.rounds)},
        }
    print(json.dumps(result, indent=1))
    write_result("object_store", {"machine": about, "read": [args.records, args.packs], **result}, args.out)


if __name__ == "__main__":
    main()
