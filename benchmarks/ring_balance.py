"""How even a ring's work is: (query, key) pairs of the busiest rank over the mean, and tokens that are shown to others.

    python -m benchmarks.ring_balance [--packs 8] [--recorded 8] [--out benchmarks/results/ring_balance-DATE.json]

Packs: mixed ones drawn to the shapes of stage 2 (16,384 tokens) and 3 (36,864), a video of 384 frames, one text
(tests/support/trees.py), and the demo's shards read by the real loader with stage 2's limits (`--recorded`, 0: none).
Rings of 2 to 16, as in layouts 1x2 to 1x16; 2x4 has the ring of 1x4. Ways to share a pack out:

none     consecutive runs
zigzag   run r and run 2R-1-r of 2R equal ones: even under a plain causal mask
cost     what parallel.ring_balance=cost does (attention/balance.py)

pairs    max over mean, mean and worst of the packs; padding sees the padding of its own rank
shown    tokens that the rank with most of them sends in one forward pass, over those that it holds; mean of the packs
host     milliseconds to find the order and what is visible, processor time of one thread, mean of the packs
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import machine, write_result
from molmo2_nemo.attention.balance import balanced_order, pairs_of, work_of_tokens
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.ring import visible_keys
from molmo2_nemo.data.special_tokens import image_numbers
from tests.support.trees import Tree, long_video_pack, mixed_pack, token_mask

RINGS = (2, 4, 8, 16)
LIMITS = [  # of stage 2, over the tiny recipe's
    *("data.image.crop_size=378", "data.image.margin=4", "data.image.max_crops=8", "data.image.high_res_max_crops=24"),
    *("data.image.max_images=5", "data.image.max_multi_image_crops=8", "data.packing.buffer_size=48"),
    *("data.video.max_frames=128", "data.packing.sequence_length=16384", "data.packing.max_crops=128"),
]


def zigzag(mask: TokenMask, ranks: int) -> np.ndarray:
    runs = np.array_split(np.arange(mask.size), 2 * ranks)
    return np.concatenate([np.concatenate((runs[r], runs[-1 - r])) for r in range(ranks)])


WAYS: dict[str, Callable[[TokenMask, int], np.ndarray | None]] = {
    "none": lambda _mask, _ranks: None,
    "zigzag": zigzag,
    "cost": balanced_order,
}


def made_packs(count: int) -> dict[str, list[TokenMask]]:
    def mixed(size: int) -> list[TokenMask]:
        return [token_mask([mixed_pack(np.random.default_rng(seed), size)], size) for seed in range(count)]

    return {
        "mixed, 16,384 tokens": mixed(16384),
        "mixed, 36,864 tokens": mixed(36864),
        "video of 384 frames": [token_mask([long_video_pack()], 36864)],
        "one text, 36,864 tokens": [token_mask([[Tree((36864,))]], 36864)],
    }


def recorded_packs(count: int) -> list[TokenMask]:
    """Packs of the demo's shards, as the loader makes them for stage 2."""
    from data_prep.demo import build_demo
    from molmo2_nemo.data.loader import PackStream
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.settings.compose import compose

    with tempfile.TemporaryDirectory() as folder:
        build_demo(folder)
        cfg = compose(["recipe=tiny", "stage=sft", f"data.sources.demo.path={folder}/sft", *LIMITS])
        stream = PackStream(cfg.data, micro_batch_size=1, dp_rank=0, dp_size=1)
        found, rows = [], preset(cfg.model.preset).text.vocab_size
        for batch in islice(stream, count):
            numbers = image_numbers(batch.input_ids, batch.visual, rows)
            host = np.stack((batch.example_ids, batch.branch_ids, numbers))
            found.append(TokenMask(*torch.from_numpy(host).unbind(), cfg.model.visual_attention, host))
    return found


def shared_out(mask: TokenMask, way: str, ranks: int) -> tuple[float, float, float]:
    """Max over mean of the pairs, tokens shown over tokens held, milliseconds."""
    mask = replace(mask, regions={})
    start = time.process_time()
    mask.order = WAYS[way](mask, ranks)
    visible = visible_keys(mask, ranks)
    taken = time.process_time() - start
    order = np.arange(mask.size) if mask.order is None else mask.order
    pairs = pairs_of(list(order.reshape(ranks, -1)), *work_of_tokens(mask))
    shown = [sum(visible.count(i, j) for i in range(ranks) if i != j) for j in range(ranks)]
    return max(pairs) / float(np.mean(pairs)), max(shown) * ranks / mask.size, 1000 * taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=8, help="mixed packs of each length; 0: only the recorded")
    parser.add_argument("--recorded", type=int, default=8, help="packs of the demo's shards")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    packs = made_packs(args.packs) if args.packs else {}
    if args.recorded:
        packs["demo, stage 2's limits"] = recorded_packs(args.recorded)
    rows: list[dict[str, Any]] = []
    for name, masks in packs.items():
        for ranks in RINGS:
            for way in WAYS:
                each = np.array([shared_out(mask, way, ranks) for mask in masks])
                pairs, shown, host = each.mean(0)
                row = {"packs": name, "ring": ranks, "way": way, "pairs": round(pairs, 3)}
                row |= {"worst": round(each[:, 0].max(), 3), "shown": round(shown, 2), "host_ms": round(host, 1)}
                rows.append(row)
                print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    settings = {"packs": args.packs, "recorded": args.recorded, "limits": LIMITS}
    write_result("ring_balance", {"machine": machine(), "settings": settings, "results": rows}, args.out)


if __name__ == "__main__":
    main()
