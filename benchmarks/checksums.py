"""What comparing the CRC-32 of every record costs, as a share of reading and building an example, on one core.

    python -m benchmarks.checksums [--rounds 7] [--out benchmarks/results/checksums-DATE.json]

The data of `benchmarks.loader`: photographs of camera sizes as JPEG, and a minute of 1280 x 720 as H.264; published
settings. Both ways run in turn, in rounds: `checked` as in training, `unchecked` with a manifest that has no checksums.
The same arrays come out, which is checked. Beside them the checksum alone, over the same bytes. Times are processor
time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.loader import make_data
from benchmarks.report import machine, write_result
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.example import Example
from molmo2_nemo.data.manifest import ShardIndex, members_crc
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer


def epoch(dataset: ShardDataset, builder: ExampleBuilder) -> tuple[float, list[Example]]:
    """Processor seconds of reading and building every record once, and the examples."""
    began = time.process_time()
    built = []
    for i in range(len(dataset)):
        record = parse_record(*dataset.read(i))
        built.append(builder.build(record, np.random.default_rng(i), max_tokens=16384))
    return time.process_time() - began, built


def checksum_alone(dataset: ShardDataset) -> tuple[float, int]:
    """Processor seconds of the checksums of every record, and their bytes."""
    contents = [dataset.read(i)[1] for i in range(len(dataset))]
    began = time.process_time()
    for members in contents:
        members_crc(members)
    return time.process_time() - began, sum(len(data) for members in contents for data in members.values())


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    builder = ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"))
    dataset = ShardDataset(folder)
    epoch(dataset, builder)  # once unmeasured: libraries load their parts at first use
    seconds: dict[str, list[float]] = {"checked": [], "unchecked": [], "checksum": []}
    size = 0
    for _ in range(rounds):
        taken, checked = epoch(dataset, builder)
        seconds["checked"].append(taken)
        with mock.patch.object(ShardIndex, "crc", lambda *_: None):
            taken, unchecked = epoch(dataset, builder)
        seconds["unchecked"].append(taken)
        taken, size = checksum_alone(dataset)
        seconds["checksum"].append(taken)
        for a, b in zip(checked, unchecked, strict=True):
            assert np.array_equal(a.crops, b.crops) and np.array_equal(a.input_ids, b.input_ids)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "records": len(dataset),
        "bytes": size,
        "seconds": {name: [round(v, 5) for v in values] for name, values in seconds.items()},
        "checksum_gb_per_second": round(size / middle["checksum"] / 1e9, 2),
        "checksum_share_of_an_example": round(middle["checksum"] / middle["unchecked"], 5),
        "checked_over_unchecked": round(middle["checked"] / middle["unchecked"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/checksums-<date>.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pictures, videos = make_data(Path(folder))
        result = {"pictures": compare(pictures, args.rounds), "videos": compare(videos, args.rounds)}
    print(json.dumps(result, indent=1))
    write_result("checksums", {"machine": machine(), "rounds": args.rounds, **result}, args.out)


if __name__ == "__main__":
    main()
