"""What packs are made of, recorded from the real loader, for `benchmarks.dynamic_cp --recorded`.

    python -m benchmarks.record_packs OUT.jsonl [--packs 128] [--micro-batch 1] OVERRIDE...

The overrides are those of `molmo2 train`: recipe, stage, data.*. Shards are read, media decoded, packs packed as in
training; of each micro-batch one line is kept: tokens, pairs of the mask, crops and visual tokens of every indivisible
unit, filled window positions, scored tokens. The first line says what was read and with which limits. For example the
demo's shards with the limits of stage 2:

    python -m data_prep.demo demo/data
    python -m benchmarks.record_packs packs.jsonl recipe=tiny stage=sft data.image.crop_size=378 data.image.margin=4 \\
        data.image.max_crops=8 data.video.max_frames=128 data.packing.sequence_length=16384 data.packing.max_crops=128
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.errors import UserError

NUMBERS = ("tokens", "pairs", "window_positions", "scored", "length", "packs")


def record(overrides: list[str], packs: int, micro_batch: int) -> tuple[dict[str, Any], list[PackCounts]]:
    """What was read, and the first so many micro-batches of a run's first data-parallel rank."""
    from molmo2_nemo.data.loader import PackStream
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.settings.compose import compose

    cfg = compose(overrides)
    packing = cfg.data.packing
    stream = PackStream(cfg.data, micro_batch_size=micro_batch, dp_rank=0, dp_size=1)
    head = {
        "sources": sorted(cfg.data.sources),
        "sequence_length": packing.sequence_length,
        "max_crops": packing.max_crops,
        "visual_attention": cfg.model.visual_attention,
        "overrides": [text for text in overrides if "/" not in text],  # no folders of this machine
    }
    rule, vocab_size = cfg.model.visual_attention, preset(cfg.model.preset).text.vocab_size
    return head, [PackCounts.of(batch, rule, vocab_size) for batch in islice(stream, packs)]


def write(path: Path, head: dict[str, Any], packs: Iterable[PackCounts]) -> None:
    """One JSON line for the head and for each micro-batch; equal units that follow each other are counted."""
    lines = [json.dumps(head)]
    for pack in packs:
        units = zip(pack.unit_crops.tolist(), pack.unit_pooled_tokens.tolist(), strict=True)
        runs = [[len(list(run)), *unit] for unit, run in groupby(units)]
        lines.append(json.dumps({name: getattr(pack, name) for name in NUMBERS} | {"units": runs}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[PackCounts]]:
    """A recording that `write` made: its head, and the counts of its micro-batches.

    Raises:
        UserError: the file is not such a recording.
    """
    try:
        head, *rows = (json.loads(line) for line in path.read_text().splitlines())
        packs = []
        for row in rows:
            runs = np.array(row["units"], np.int64).reshape(-1, 3)
            crops, pooled = (np.repeat(runs[:, i], runs[:, 0]) for i in (1, 2))
            numbers = {name: row[name] for name in NUMBERS}
            packs.append(PackCounts(unit_crops=crops, unit_pooled_tokens=pooled, **numbers))
        head["sequence_length"], head["max_crops"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of benchmarks.record_packs ({type(error).__name__}: {error})") from error
    return head, packs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_packs", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--packs", type=int, default=128, help="micro-batches that are recorded")
    parser.add_argument("--micro-batch", type=int, default=1, help="packs of each")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(argv)
    try:
        head, packs = record(args.overrides, args.packs, args.micro_batch)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(args.out, head, packs)
    filled = np.mean([p.tokens / p.packs for p in packs]) / head["sequence_length"]
    crops = np.mean([p.unit_crops.sum() / p.packs for p in packs]) / head["max_crops"]
    print(f"{args.out}: {len(packs)} micro-batches, {filled:.1%} of their tokens and {crops:.1%} of their crops in use")
    return 0


if __name__ == "__main__":
    sys.exit(main())
