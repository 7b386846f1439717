"""What packs are made of, recorded from a run's own shards: for plans of those packs, and of dynamic context groups.

Of each pack tokens, pairs of the mask, crops and visual tokens of every indivisible unit, filled window positions and
scored tokens are kept, as JSON lines; the first line says what was read and with which limits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from molmo2_nemo.cost.workload import Workload
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.lengths import length_problems, of_length
from molmo2_nemo.errors import UserError, plural
from molmo2_nemo.files import write_text
from molmo2_nemo.model.config import preset
from molmo2_nemo.settings.run import RunConfig, data_config

NUMBERS = ("tokens", "pairs", "window_positions", "scored", "length", "packs")


@dataclass(frozen=True)
class Recording:
    """A file of packs.

    Args:
        head: `sequence_length`, `max_crops`, and what was read.
    """

    path: Path
    head: dict[str, Any]
    packs: list[PackCounts]

    def workload(self, cfg: RunConfig, work: Workload) -> Workload:
        """`work` with the averages of these packs.

        Raises:
            UserError: they were packed with other limits than the run's.
        """
        packing = cfg.data.packing
        for key in ("sequence_length", "max_crops"):
            if self.head[key] != getattr(packing, key):
                raise UserError(
                    f"{self.path}: its packs were made with data.packing.{key}={self.head[key]}, this run has "
                    f"{getattr(packing, key)}; record anew (molmo2 plan --record FILE), or plan with theirs"
                )
        return replace(
            work,
            tokens=_mean(self.packs, "tokens"),
            area=_mean(self.packs, "pairs") / work.length**2,
            crops=_mean(self.packs, "crops"),
            scored=_mean(self.packs, "scored"),
        )

    def steps(self, packs: int) -> list[list[PackCounts]]:
        """Whole optimizer steps of so many packs.

        Raises:
            UserError: there is not one, or micro-batches of several packs were recorded.
        """
        if any(pack.packs != 1 for pack in self.packs):
            raise UserError(f"{self.path}: has micro-batches of several packs; record them one by one")
        whole = len(self.packs) // packs
        if not whole:
            raise UserError(f"{self.path}: {plural(len(self.packs), 'pack')}, but a step takes {packs}; record as many")
        return [self.packs[i * packs : (i + 1) * packs] for i in range(whole)]


def _mean(packs: Sequence[PackCounts], name: str) -> float:
    return float(sum(getattr(pack, name) for pack in packs) / sum(pack.packs for pack in packs))


def record(cfg: RunConfig, packs: int, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], list[PackCounts]]:
    """What was read, and the first so many packs of a run: shards read, media decoded, packed as in training. With
    `data.lengths` they are packs of the longest, which a plan is for.

    Args:
        overrides: what the user asked for; those without folders are noted.
    Raises:
        UserError: lengths that make no sense; what the loader raises.
    """
    from molmo2_nemo.data.loader import PackStream

    data, packing, rule = data_config(cfg), cfg.data.packing, cfg.model.visual_attention
    for problem in length_problems(data):
        raise UserError(problem)
    if data.lengths:
        data = of_length(data, len(data.lengths) - 1)
    stream = PackStream(data, micro_batch_size=1, dp_rank=0, dp_size=1)
    head = {
        "sources": sorted(cfg.data.sources),
        "sequence_length": packing.sequence_length,
        "max_crops": packing.max_crops,
        "visual_attention": rule,
        "overrides": [text for text in overrides if "/" not in text],
    }
    vocab_size = preset(cfg.model.preset).text.vocab_size
    return head, [PackCounts.of(batch, rule, vocab_size) for batch in islice(stream, packs)]


def write(path: Path, head: dict[str, Any], packs: Iterable[PackCounts]) -> None:
    """One JSON line for the head and for each pack; equal units that follow each other are counted."""
    lines = [json.dumps(head)]
    for pack in packs:
        units = zip(pack.unit_crops.tolist(), pack.unit_pooled_tokens.tolist(), strict=True)
        runs = [[len(list(run)), *unit] for unit, run in groupby(units)]
        lines.append(json.dumps({name: getattr(pack, name) for name in NUMBERS} | {"units": runs}))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def read(path: Path) -> Recording:
    """A recording that `write` made.

    Raises:
        UserError: the file is not such a recording, or has no packs.
    """
    try:
        head, *rows = (json.loads(line) for line in path.read_text().splitlines())
        packs = []
        for row in rows:
            runs = np.array(row["units"], np.int64).reshape(-1, 3)
            crops, pooled = (np.repeat(runs[:, i], runs[:, 0]) for i in (1, 2))
            numbers = {name: int(row[name]) for name in NUMBERS}
            packs.append(PackCounts(unit_crops=crops, unit_pooled_tokens=pooled, **numbers))
        head = dict(head) | {name: int(head[name]) for name in ("sequence_length", "max_crops")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of molmo2 plan --record ({type(error).__name__}: {error})") from error
    if not packs:
        raise UserError(f"{path}: has no packs")
    return Recording(path, head, packs)
