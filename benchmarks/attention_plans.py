"""What planning the attention of a micro-batch costs the host: segments, what a ring's ranks see, and flash calls.

    python -m benchmarks.attention_plans [--size 36864] [--repeats 9] [--out FILE]

A pack of the shape of stage 2 and a video (tests/support/trees.py), planned as the last of R ranks that exchange keys
plans it, R = 1 for none: the last one has most to see. Processor time of one thread, median. A micro-batch is planned
once, in its first layer's attention; all layers and their recomputation share it. Copies to a GPU are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import machine, write_result
from molmo2_nemo.attention import flash
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.regions import region_of
from molmo2_nemo.attention.ring import visible_keys
from tests.support.trees import Tree, long_video_pack, mixed_pack, token_mask

RINGS = (1, 2, 4, 8)


def plan(mask: TokenMask, ranks: int) -> None:
    """All that the last rank's host does for a micro-batch before its kernels can run."""
    device = torch.device("cpu")
    if ranks == 1:
        flash.calls(region_of(mask), device)
        return
    visible = visible_keys(mask, ranks)
    for keys in visible.runs[-1]:
        if keys:
            flash.calls(region_of(mask, visible.chunks[-1], keys), device)


def milliseconds(trees: list[Tree], size: int, rule: str, ranks: int, repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        mask = token_mask([trees], size, rule)
        start = time.process_time()
        plan(mask, ranks)
        taken.append((time.process_time() - start) * 1000)
    return round(statistics.median(taken), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=36864)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = args.size
    packs = {"mixed": mixed_pack(np.random.default_rng(0), size), "video": long_video_pack(size, 384 * size // 36864)}
    found = {}
    for name, trees in packs.items():
        for rule in ("image_tokens", "within_image"):
            each = {str(ranks): milliseconds(trees, size, rule, ranks, args.repeats) for ranks in RINGS}
            found[f"{name}, {rule}"] = each
            print(f"{name:6} {rule:13} " + "  ".join(f"ring of {k}: {v:6.1f} ms" for k, v in each.items()), flush=True)
    write_result("attention_plans", {"machine": machine(), "tokens": size, "milliseconds": found}, args.out)


if __name__ == "__main__":
    main()
