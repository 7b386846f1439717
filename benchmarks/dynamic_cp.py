"""Dynamic against static context parallelism, simulated: predicted time of an optimizer step on 8 to 1,024 GPUs.

    python -m benchmarks.dynamic_cp [--steps 4] [--recorded FILE ...] [--out benchmarks/results/dynamic_cp-DATE.json]

Packs are drawn from the mixture of benchmarks/packing.py and packed by the same packer as in training: stage 2 (16,384
tokens, 128 crops) and stage 3 (36,864, 384); "single" is stage 3's examples one by one, as without packing.
`--recorded` adds packs that `molmo2 plan --record` took from the real loader. A step is 128 packs (for "single" as
many examples as those packs hold), shared out by plan/groups.py. Seconds come from cost/context.py, whose shares of
peak (cost/efficiency.py) are assumptions; nothing here was measured on a GPU. Static context parallelism gives every
pack to all ranks of a group of 8 and pads it to full length.

static 8          all packs on 8 ranks (Ulysses)
static 8, cut     the same without the padding behind packs (parallel.cut_padding), as all dynamic ones
dynamic 8         blocks of 1, 2, 4, 8 ranks in groups of 8 (Ulysses); a rank has memory for a full pack
dynamic 8, crops  the same where a rank has memory for an eighth of the crops: what holds unless
                  parallel.context_crops or memory.vision_chunk is set
dynamic 8, 1/4    the same where a rank has memory for a quarter of a full pack, tokens and crops
dynamic 32        blocks of 1 ... 32 ranks in groups of 32 (Ulysses over 8, ring beyond); needs 32 GPUs
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import packing
from benchmarks.report import machine, write_result
from molmo2_nemo.cost import layout as cost_layout
from molmo2_nemo.cost.context import ContextCost
from molmo2_nemo.cost.efficiency import EFFICIENCIES
from molmo2_nemo.cost.step import StepCost
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.packing import Item, Packer
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import Molmo2Config, preset
from molmo2_nemo.plan import recording
from molmo2_nemo.plan.groups import Groups, Step, step_seconds, table_of, work_of

STEP_PACKS = 128
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
IMAGE_CROPS = 9  # of one of several images: 8 tiles and the whole


LAYOUTS = {
    "static 8": Groups(8, False, cut=False),
    "static 8, cut": Groups(8, False),
    "dynamic 8": Groups(8, True),
    "dynamic 8, crops": Groups(8, True, crops=1 / 8),
    "dynamic 8, 1/4": Groups(8, True, 1 / 4, 1 / 4),
    "dynamic 32": Groups(32, True),
}


def counts(kind: str, root: int, visual: int, pictures: int, branches: list[int], length: int) -> PackCounts:
    """Counts of one example. A frame is a unit, and so are an image's tiles together; several images are taken as
    equal."""
    root, kept = min(root, length), []
    for branch in branches:
        if root + sum(kept) + branch > length:
            break
        kept.append(branch)
    is_video = kind in ("video", "captioned video", "track", "video pointing")
    visual = min(visual, root)
    parts = pictures if is_video else -(-pictures // IMAGE_CROPS) if kind == "pictures" else min(1, pictures)
    units, pooled = (
        np.array([n // parts + (i < n % parts) for i in range(parts)], np.int64) for n in (pictures, visual)
    )
    pairs = packing.example_pairs(root, visual, kept)
    tokens = root + sum(kept)
    scored = round((sum(kept) if kept else tokens // 2) * 0.8)
    return PackCounts(tokens, pairs, units, pooled, visual * (9 if is_video else 4), scored, tokens)


def together(parts: list[PackCounts]) -> PackCounts:
    """The counts of several examples as those of one pack."""
    tokens = sum(p.tokens for p in parts)
    return PackCounts(
        tokens=tokens,
        pairs=sum(p.pairs for p in parts),
        unit_crops=np.concatenate([p.unit_crops for p in parts]),
        unit_pooled_tokens=np.concatenate([p.unit_pooled_tokens for p in parts]),
        window_positions=sum(p.window_positions for p in parts),
        scored=sum(p.scored for p in parts),
        length=tokens,
    )


def draw(setting: str, packs: int, seed: int = 0) -> list[list[PackCounts]]:
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


def drawn_steps(steps: int) -> Iterator[tuple[str, list[Step]]]:
    """The steps of each of the three simulated settings."""
    for setting in packing.SETTINGS:
        length, crops, _ = packing.SETTINGS[setting]
        drawn = draw(setting, STEP_PACKS * steps)
        each = [drawn[i * STEP_PACKS : (i + 1) * STEP_PACKS] for i in range(steps)]
        yield setting, [Step([together(parts) for parts in step], length, crops) for step in each]
    yield "single", [Step([p for parts in step for p in parts], length, crops, padded=False) for step in each]


def recorded_steps(path: Path) -> tuple[str, list[Step]]:
    """Whole steps of a recording.

    Raises:
        UserError: the recording has less than one whole step.
    """
    found = recording.read(path)
    head = found.head
    return path.name, [Step(step, head["sequence_length"], head["max_crops"]) for step in found.steps(STEP_PACKS)]


def context_cost(model: Molmo2Config, kernel: str = "flash2") -> ContextCost:
    """On H100 in nodes of 8, heads shared inside a node, whole layers recomputed."""
    step = StepCost(model, efficiency=EFFICIENCIES[kernel])
    return ContextCost(step, cost_layout.Layout(recompute="full"), ulysses=8)


def simulate(setting: str, steps: list[Step], model: str, kernel: str) -> list[dict]:
    """Mean predicted seconds of a step for every layout and number of GPUs."""
    cost = context_cost(preset(model), kernel)
    works = [np.array([work_of(pack, preset(model)) for pack in step.packs], np.int64) for step in steps]
    rows: dict[int, dict] = {n: {"setting": setting, "model": model, "gpus": n} for n in GPUS}
    for name, layout in LAYOUTS.items():
        costs = [table_of(step, cost, layout) for step in steps]
        for gpus in GPUS:
            if gpus >= layout.size:
                seconds = [step_seconds(c, w, gpus, layout) for c, w in zip(costs, works, strict=True)]
                rows[gpus][name] = round(float(np.mean(seconds)), 4)
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamic_cp", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps that are averaged, of drawn packs")
    parser.add_argument("--recorded", type=Path, nargs="*", default=[], help="files of molmo2 plan --record")
    parser.add_argument("--model", default="8b")
    parser.add_argument(
        "--kernel", choices=list(EFFICIENCIES), default="flash2", help="whose speed of attention to assume"
    )
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/dynamic_cp-<date>.json")
    args = parser.parse_args(argv)
    try:
        recorded = [recorded_steps(path) for path in args.recorded]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = []
    for setting, steps in (*drawn_steps(args.steps), *recorded):
        for row in simulate(setting, steps, args.model, args.kernel):
            results.append(row)
            static = row["static 8"]
            others = ", ".join(
                f"{n} {row[n]:.2f} s ({static / row[n]:.2f}x)" for n in LAYOUTS if n in row and n != "static 8"
            )
            print(f"{setting:>6} {row['gpus']:>5} GPUs: static 8 {static:.2f} s; {others}", flush=True)
    settings = {"steps": args.steps, "packs_per_step": STEP_PACKS, "model": args.model, "kernel": args.kernel}
    settings["recorded"] = [path.name for path in args.recorded]
    write_result("dynamic_cp", {"machine": machine(), "settings": settings, "results": results}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
