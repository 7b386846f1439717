"""Dynamic against static context parallelism, simulated: predicted time of an optimizer step on 8 to 1,024 GPUs.

    python -m benchmarks.dynamic_cp [--steps 4] [--out benchmarks/results/dynamic_cp-DATE.json]

Packs are drawn from the mixture of benchmarks/packing.py and packed by the same packer as in training: stage 2 (16,384
tokens, 128 crops) and stage 3 (36,864, 384); "single" is stage 3's examples one by one, as without packing. A step is
128 packs (for "single" as many examples as those packs hold), dealt to replicas by data/balance.py, and inside a
replica to blocks of ranks by parallel/schedule.py: the code that training runs. Seconds come from parallel/cost.py,
whose rates are assumptions; nothing here was measured on a GPU. Left out, as it is the same for all: the gradients'
reduction and the optimizer. Static context parallelism gives every pack to all ranks of a group of 8 and pads it to
full length.

static 8     all packs on 8 ranks (Ulysses)
cut          the same without the padding behind packs (parallel.cut_padding), as all dynamic ones
dynamic 8    blocks of 1, 2, 4, 8 ranks in groups of 8 (Ulysses)
dynamic 32   blocks of 1 ... 32 ranks in groups of 32 (Ulysses over 8, ring beyond); needs 32 GPUs
limit        the same two, where a rank has memory for a quarter of a full pack only
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import packing
from benchmarks.report import machine, write_result
from molmo2_nemo.data.balance import deal, example_pairs
from molmo2_nemo.data.packing import Item, Packer
from molmo2_nemo.model.config import preset
from molmo2_nemo.parallel.context import degrees
from molmo2_nemo.parallel.cost import ContextCost, PackCounts
from molmo2_nemo.parallel.schedule import assign, step_time

STEP_PACKS = 128
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Layout:
    """Context groups of `size` ranks; a rank may get `limit` of a full pack's tokens. Dynamic ones cut padding."""

    size: int
    dynamic: bool
    limit: float = 1.0
    cut: bool = True


LAYOUTS = {
    "static 8": Layout(8, False, cut=False),
    "static 8, cut": Layout(8, False),
    "dynamic 8": Layout(8, True),
    "dynamic 32": Layout(32, True),
    "dynamic 8, limit": Layout(8, True, 0.25),
    "dynamic 32, limit": Layout(32, True, 0.25),
}


def counts(kind: str, root: int, visual: int, pictures: int, branches: list[int], length: int) -> PackCounts:
    """Of one example. Frames are units of their own, the tiles of a picture are one."""
    root, kept = min(root, length), []
    for branch in branches:
        if root + sum(kept) + branch > length:
            break
        kept.append(branch)
    rows = min(visual, root)
    is_video = kind in ("video", "captioned video", "track", "video pointing")
    units = np.ones(pictures, np.int64) if is_video else np.array([pictures] if pictures else [], np.int64)
    pairs = int(example_pairs(np.int64(root), np.int64(rows))) + sum(b * (b + 1) // 2 + b * root for b in kept)
    tokens = root + sum(kept)
    scored = round((sum(kept) if kept else tokens // 2) * 0.8)
    return PackCounts(tokens, pairs, units, rows, rows * (9 if is_video else 4), scored)


def together(parts: list[PackCounts]) -> PackCounts:
    return PackCounts(
        tokens=sum(p.tokens for p in parts),
        pairs=sum(p.pairs for p in parts),
        unit_crops=np.concatenate([p.unit_crops for p in parts]),
        rows=sum(p.rows for p in parts),
        slots=sum(p.slots for p in parts),
        scored=sum(p.scored for p in parts),
    )


def record(setting: str, packs: int, seed: int = 0) -> list[list[PackCounts]]:
    """The first so many packs of the mixture, each as the counts of its examples."""
    length, crops, frames = packing.SETTINGS[setting]
    packer, rng, found = Packer(length, crops), random.Random(seed), []
    kinds, shares = list(packing.SHARES), list(packing.SHARES.values())
    number = 0
    while len(found) < packs:
        kind = rng.choices(kinds, shares)[0]
        root, visual, pictures, branches = packing.example(kind, rng, frames)
        if pictures > crops:
            continue
        example = counts(kind, root, visual, pictures, branches, length)
        pack = packer.add(Item(number, example.tokens, pictures, example))
        number += 1
        if pack:
            found.append([item.payload for item in pack])
    return found


def table_of(packs: list[PackCounts], cost: ContextCost, layout: Layout, full: int) -> np.ndarray:
    """Microseconds of each pack by degree, -1 where it does not fit; int64 [packs, degrees]."""
    sizes = degrees(layout.size)
    found = np.full((len(packs), len(sizes)), -1, np.int64)
    for row, pack in zip(found, packs, strict=True):
        for column, size in enumerate(sizes):
            if size == layout.size or (layout.dynamic and pack.tokens <= size * layout.limit * full):
                row[column] = cost.microseconds(pack, size)
    return found


def step_seconds(costs: np.ndarray, gpus: int, layout: Layout) -> float:
    """The slowest replica of one step; costs [k, degrees] as `table_of` has them."""
    replicas, sizes = gpus // layout.size, degrees(layout.size)
    usable = len(costs) // replicas * replicas
    work = np.where(costs < 0, np.iinfo(np.int64).max // 64, costs)[:usable] * sizes  # of all ranks together
    place = deal(work.min(axis=1).reshape(replicas, -1))
    slowest = 0
    for mine in place:
        if layout.dynamic:
            slowest = max(slowest, step_time(assign(costs[mine], sizes), costs[mine], sizes))
        else:
            slowest = max(slowest, int(costs[mine, -1].sum()))
    return slowest * 1e-6


def simulate(setting: str, model: str, steps: int) -> list[dict]:
    """Mean predicted seconds of a step for every layout and number of GPUs."""
    recorded = record("long" if setting == "single" else setting, STEP_PACKS * steps)
    full = packing.SETTINGS["long" if setting == "single" else setting][0]
    cost = ContextCost(preset(model), ulysses=8, passes=4)
    rows: dict[int, dict] = {n: {"setting": setting, "model": model, "gpus": n} for n in GPUS}
    for name, layout in LAYOUTS.items():
        seconds: dict[int, list[float]] = {n: [] for n in GPUS if n >= layout.size}
        for step in range(steps):
            chosen = recorded[step * STEP_PACKS : (step + 1) * STEP_PACKS]
            packs = [p for parts in chosen for p in parts] if setting == "single" else [together(p) for p in chosen]
            if not layout.cut and setting != "single":
                packs = [replace(p, tokens=full) for p in packs]  # padding is worked on
            costs = table_of(packs, cost, layout, full)
            for gpus, found in seconds.items():
                found.append(step_seconds(costs, gpus, layout))
        for gpus, found in seconds.items():
            rows[gpus][name] = round(float(np.mean(found)), 4)
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamic_cp", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps that are averaged")
    parser.add_argument("--model", default="8b")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/dynamic_cp-<date>.json")
    args = parser.parse_args(argv)
    results = []
    for setting in ("SFT", "long", "single"):
        for row in simulate(setting, args.model, args.steps):
            results.append(row)
            static = row["static 8"]
            others = ", ".join(
                f"{n} {row[n]:.2f} s ({static / row[n]:.2f}x)" for n in LAYOUTS if n in row and n != "static 8"
            )
            print(f"{setting:>6} {row['gpus']:>5} GPUs: static 8 {static:.2f} s; {others}", flush=True)
    settings = {"steps": args.steps, "packs_per_step": STEP_PACKS, "model": args.model}
    write_result("dynamic_cp", {"machine": machine(), "settings": settings, "results": results}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
