"""What keeping a frozen encoder's features saves: an epoch's encoding without, the first epoch with, and later ones.

    python -m benchmarks.frozen_encoder [--rounds 5] [--blocks 3] [--crops 4] [--out benchmarks/results/...]

The encoder has the published widths and patches, `--blocks` of the published 25 blocks, and fp32 (6.7 MB a crop); it
runs on one thread (reading has four). Crops are noise. The ways run in turn, in rounds:

together    all crops at once, as without any setting
one by one  as with a folder, but without one (data.feature_cache.together=1)
first       hashed, not found, encoded one by one, written; until all is written
later       hashed and read, from the page cache
from disk   the same after the system was asked to drop the files from memory

Times are wall time, since a disk takes no processor time; `hash` is that of the keys alone. One by one, first and later
must give the same bits, which is checked; whether `together` does is noted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import machine, write_result
from molmo2_nemo.data.config import FeatureCacheConfig
from molmo2_nemo.features.frozen import FrozenFeatures
from molmo2_nemo.features.store import HEADER, key_of
from molmo2_nemo.model.config import VisionConfig
from molmo2_nemo.model.vision import VisionEncoder


def made(blocks: int) -> VisionEncoder:
    torch.manual_seed(0)
    encoder = VisionEncoder(VisionConfig(num_layers=blocks, feature_layers=(-1, -2)))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    return encoder.requires_grad_(False)


def epoch(encoder: VisionEncoder, crops: Tensor, folder: Path | None) -> tuple[float, Tensor, Any]:
    """Seconds of an epoch once the weights are hashed, the features, and the counts."""
    vision = encoder.config
    config = FeatureCacheConfig(None if folder is None else str(folder), keep_free_gib=0, together=1)
    features = FrozenFeatures(encoder, (vision.num_patches, vision.feature_size), config, (vision,))
    features.store()
    began = time.perf_counter()
    out = features.encode(crops, features.look_up(crops), slice(0, len(crops)))
    features.close()
    return time.perf_counter() - began, out, features.counts


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def dropped(folder: Path) -> None:
    """Ask the system to forget what it has of the files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_round(encoder: VisionEncoder, crops: Tensor, found: dict[str, list[float]]) -> bool:
    """Adds the seconds of every way; whether encoding all together gave the same bits, too."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds: dict[str, float] = {}
        with torch.no_grad():
            seconds["together"], together = timed(lambda: encoder(crops))
        seconds["one by one"], alone, _ = epoch(encoder, crops, None)
        seconds["first"], first, counts = epoch(encoder, crops, folder)
        assert torch.equal(first, alone) and counts.misses == len(crops) and counts.unsaved == 0
        for way in ("later", "from disk"):
            if way == "from disk":
                dropped(folder)
            seconds[way], later, counts = epoch(encoder, crops, folder)
            assert torch.equal(later, alone) and counts.hits == len(crops)
        seconds["hash"], _ = timed(lambda: [key_of(crop) for crop in crops.numpy()])
    for way, taken in seconds.items():
        found.setdefault(way, []).append(taken)
    return torch.equal(together, alone)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--crops", type=int, default=4)
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/frozen_encoder-<date>.json")
    args = parser.parse_args(argv)
    before = machine()
    torch.set_num_threads(1)
    encoder = made(args.blocks)
    vision = encoder.config
    crops = torch.randint(0, 256, (args.crops, vision.num_patches, vision.patch_dim), dtype=torch.uint8)
    epoch(encoder, crops[:1], None)  # once unmeasured
    found: dict[str, list[float]] = {}
    same = [one_round(encoder, crops, found) for _ in range(args.rounds)]
    middle = {way: statistics.median(values) for way, values in found.items()}
    result = {
        "machine": before,
        "blocks": args.blocks,
        "crops": args.crops,
        "bytes_per_crop": HEADER.size + vision.num_patches * vision.feature_size * 4,
        "seconds": {way: [round(v, 4) for v in values] for way, values in found.items()},
        "milliseconds_per_crop": {way: round(1e3 * v / args.crops, 2) for way, v in middle.items()},
        "over_together": {way: round(v / middle["together"], 4) for way, v in middle.items()},
        "together_gives_the_same_bits": all(same),
    }
    print(json.dumps(result, indent=1))
    write_result("frozen_encoder", result, args.out)
    return result


if __name__ == "__main__":
    main()
