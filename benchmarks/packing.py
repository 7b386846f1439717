"""Packing against the exact knapsack on a stream like the SFT mixture: fill, waits, time, and work per rank.

    python -m benchmarks.packing [--packs 2000] [--out benchmarks/results/packing-DATE.json]

The stream follows the shares of the published mixture by kind (text, single pictures with and without many tiles,
several pictures, short and long videos) with the token counts of Molmo2's layouts; lengths of texts and videos are our
assumption, chosen so that about 3.8 examples share 16,384 tokens, as published. Both packers see the same examples in
the same run, balanced over 8 data-parallel ranks as in training; an optimizer step takes 128 packs.

efficiency   max(sum of tokens / S, sum of crops / budget) over the packed examples / packs used, worst rank and all
wait         longest wait of an example, in packs of its rank
ms           processor time for one pack
spread       largest rank's estimated FLOPs over the mean, per step: mean, 95th percentile and maximum over the steps;
             as packed, and as balanced among the 8 ranks (16 packs of each in a step)
single       the same where each rank has one pack in a step, as packed and in windows of packs in order of cost
             (data.packing.balance_window): over the 8 ranks, and over 128 made of stretches of the 8 ranks' packs
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.report import machine, write_result
from molmo2_nemo.data.balance import UNIT, CostModel, balance, spread
from molmo2_nemo.data.config import PackingConfig
from molmo2_nemo.data.packing import Item, Packer

RANKS = 8
WINDOW = PackingConfig.balance_window
STEP_PACKS = 128
SETTINGS = {"SFT": (16384, 128, 128), "long": (36864, 384, 384)}  # sequence length, crops of a pack, frames of a video
FRAME_TOKENS = 89  # 81 patches, 2 markers, about 6 of the timestamp
SHARES = {
    "text": 9.1,
    "picture": 22.7 + 13.6 / 3,
    "pointing": 9.1,
    "pictures": 13.6 / 6,
    "video": 18.2 + 13.6 / 3,
    "captioned video": 13.6 / 6,
    "track": 13.6,
    "video pointing": 13.6,
}


def picture(rng: random.Random, tiles: int) -> tuple[int, int]:
    """Tokens and crops of one picture with up to `tiles` tiles (19 patches apart, 4 of margin, 2 x 2 pooling)."""
    wanted = min(tiles, max(1, round(rng.lognormvariate(math.log(5), 0.7))))
    rows = rng.randint(1, wanted)
    cols = max(1, wanted // rows)
    high, wide = (-(-(n * 19 + 8) // 2) for n in (rows, cols))
    return 14 * 14 + 2 + high * (wide + 1) + 2, rows * cols + 1


def text(rng: random.Random, median: float, sigma: float = 0.6) -> int:
    return max(4, round(rng.lognormvariate(math.log(median), sigma)))


def example(kind: str, rng: random.Random, frames: int) -> tuple[int, int, int, list[int]]:
    """Root tokens, visual tokens, crops, and the tokens of each branch."""
    if kind == "text":
        return text(rng, 600, 0.9), 0, 0, []
    if kind in ("picture", "pointing"):
        tiles = 24 if kind == "pointing" and rng.random() < 0.3 else 8
        tokens, crops = picture(rng, tiles)
        branches = [text(rng, 60) for _ in range(rng.choice([1, 1, 2, 4, 8]))]
        return tokens + 1, tokens, crops, branches
    if kind == "pictures":
        parts = [picture(rng, 8) for _ in range(rng.randint(2, 5))]
        tokens, crops = (sum(values) for values in zip(*parts, strict=True))
        return tokens + 3 * len(parts), tokens, crops, [text(rng, 150)]
    median, sigma, words, many = {
        "video": (45, 1.2, 40, 4),
        "captioned video": (90, 0.9, 700, 1),
        "track": (20, 0.8, 500, 1),
        "video pointing": (40, 0.5, 100, 2),
    }[kind]
    seconds = rng.lognormvariate(math.log(median), sigma)
    count = min(frames, 2 * int(seconds) + 2)
    branches = [text(rng, words) for _ in range(rng.randint(1, many))]
    return count * FRAME_TOKENS + 1, count * 83, count, branches


def example_pairs(root: int, visual: int, branches: Sequence[int]) -> int:
    """Pairs that the mask allows in an example, from the tokens of its root, the visual ones of them, and its branches:
    everything earlier, and for visual tokens the later ones too. Tested against data/counts.py, which takes tokens."""
    earlier = root * (root + 1) // 2 + sum(b * (b + 1) // 2 + b * root for b in branches)
    return earlier + visual * (visual - 1) // 2


def stream(seed: int, length: int, crops: int, frames: int) -> Iterator[Item]:
    """Endless examples; the payload is the estimated forward cost."""
    rng, cost = random.Random(seed), CostModel()
    n = 0
    while True:
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        root, visual, pictures, branches = example(kind, rng, frames)
        if pictures > crops:
            continue
        root = min(root, length)
        kept = []
        for branch in branches:  # branches that do not fit are dropped
            if root + sum(kept) + branch > length:
                break
            kept.append(branch)
        pairs = example_pairs(root, min(visual, root), kept)
        tokens = root + sum(kept)
        patches = min(visual, root)
        work = cost.token * tokens + cost.pair * pairs + cost.crop * pictures + cost.pooled_token * patches
        work += (
            cost.window_position
            * patches
            * (9 if kind in ("video", "captioned video", "track", "video pointing") else 4)
        )
        work += cost.score * (sum(kept) if kept else tokens // 2) * 0.8
        yield Item(n, tokens, pictures, round(work / UNIT))
        n += 1


def measure(mode: str, setting: str, packs: int, buffer: int, seed: int = 0) -> dict:
    """Pack until every rank has its packs."""
    length, crops, frames = SETTINGS[setting]
    packers = [Packer(length, crops, buffer_size=buffer, mode=mode) for _ in range(RANKS)]
    per_rank = packs // RANKS
    costs: list[list[int]] = [[] for _ in packers]
    fill = np.zeros((RANKS, 2))
    examples = longest = 0
    seconds = 0.0
    for item in stream(seed, length, crops, frames):
        rank = item.id % RANKS
        if len(costs[rank]) == per_rank:
            if all(len(c) == per_rank for c in costs):
                break
            continue
        started = time.process_time()
        pack = packers[rank].add(item)
        seconds += time.process_time() - started
        if pack:
            costs[rank].append(sum(i.payload for i in pack))
            fill[rank] += sum(i.tokens for i in pack) / length, sum(i.crops for i in pack) / crops
            examples += len(pack)
            longest = max(longest, *(packers[rank].emitted - 1 - i.arrived for i in pack))
    waiting = [packer.emitted - item.arrived for packer in packers for item in packer.waiting]
    table = np.array(costs, np.int64)
    result = {
        "efficiency": float(fill.sum(0).max() / table.size),
        "efficiency_worst_rank": float((fill.max(1) / per_rank).min()),
        "token_fill": float(fill[:, 0].sum() / table.size),
        "crop_fill": float(fill[:, 1].sum() / table.size),
        "examples_per_pack": examples / table.size,
        "longest_wait": longest,
        "longest_still_waiting": max(waiting),
        "ms_per_pack": seconds / table.size * 1e3,
        "pack_cost_variation": float(table.std() / table.mean()),
    }
    single = {f"single_{ranks}_ranks": singles(table, ranks) for ranks in (RANKS, STEP_PACKS)}
    return result | spreads(table, STEP_PACKS // RANKS) | single


def spreads(table: np.ndarray, count: int) -> dict:
    """Max over mean per step, as packed and as balanced, the share of packs that travel, and the time of balancing."""
    own, balanced, moved, seconds = [], [], 0, 0.0
    for start in range(0, table.shape[1] - count + 1, count):
        costs = table[:, start : start + count]
        began = time.process_time()
        place = balance(costs)
        seconds += time.process_time() - began
        own.append(spread(costs))
        balanced.append(spread(costs.reshape(-1)[place]))
        moved += int((place // count != np.arange(RANKS)[:, None]).sum())
    return {
        "spread_as_packed": summary(own),
        "spread_balanced": summary(balanced),
        "packs_moved": moved / (len(own) * RANKS * count),
        "ms_per_balancing": seconds / len(own) * 1e3,
    }


def singles(table: np.ndarray, ranks: int) -> dict:
    """Spread of steps with one pack per rank, as packed and in windows; `table` [8, n] is cut into `ranks` rows."""
    pieces = ranks // RANKS
    steps = table.shape[1] // pieces // WINDOW * WINDOW
    if not steps:
        return {}
    rows = table[:, : pieces * steps].reshape(ranks, steps)
    ordered = -np.sort(-rows.reshape(ranks, -1, WINDOW), axis=2).reshape(ranks, steps)
    found = {"as_packed": rows, "in_windows": ordered}
    return {name: summary([spread(t[:, i : i + 1]) for i in range(steps)]) for name, t in found.items()}


def summary(values: list[float]) -> list[float]:
    return [round(float(v), 4) for v in (np.mean(values), np.percentile(values, 95), max(values))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=int, default=2048, help="packs of all 8 ranks, by setting and packer")
    parser.add_argument("--buffer", type=int, default=48)
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/packing-<date>.json")
    args = parser.parse_args(argv)
    results = {}
    for setting in SETTINGS:
        for mode in ("knapsack", "balanced"):
            found = results[f"{setting} {mode}"] = measure(mode, setting, args.packs, args.buffer)
            print(
                f"{setting:>5} {mode:>9}: efficiency {found['efficiency']:.4f} (tokens {found['token_fill']:.4f}, "
                f"crops {found['crop_fill']:.4f}), {found['examples_per_pack']:.2f} examples a pack, longest wait "
                f"{max(found['longest_wait'], found['longest_still_waiting'])}, {found['ms_per_pack']:.1f} ms a pack, "
                f"spread {found['spread_as_packed'][2]:.3f} -> {found['spread_balanced'][2]:.3f}, "
                f"{found['packs_moved']:.1%} moved",
                flush=True,
            )
            for name, single in found.items():
                if name.startswith("single") and single:
                    print(f"      {name}: spread {single['as_packed'][0]:.3f} -> {single['in_windows'][0]:.3f} (mean)")
    settings = {"packs": args.packs, "buffer": args.buffer, "ranks": RANKS, "packs_per_step": STEP_PACKS}
    write_result("packing", {"machine": machine(), "settings": settings, "results": results}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
