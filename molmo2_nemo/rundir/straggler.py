"""The rank that the others of a run keep waiting for, from the lines of metrics.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WINDOW = 20  # last steps that are looked at
LEAST = 8  # steps with the figures before anything is said
SHARE = 0.75  # of those steps in which the same rank must be the slowest
LAG = 0.1  # of a step's seconds that the others wait for it, on average of those steps


def straggler(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """Who is slower than the rest and by what measure, in one line; None where nobody is for long.

    Args:
        steps: lines of metrics.jsonl, in their order.
    """
    known = [line for line in steps[-WINDOW:] if isinstance(line.get("slowest"), dict) and line.get("seconds")]
    if len(known) < LEAST:
        return None
    rank = statistics.mode(line["slowest"]["rank"] for line in known)
    own = [line for line in known if line["slowest"]["rank"] == rank]
    if len(own) < SHARE * len(known):
        return None
    seconds, lag = (statistics.fmean(line[name] for line in own) for name in ("seconds", "lag"))
    if lag < LAG * seconds:
        return None
    means = {name: statistics.fmean(line["slowest"][name] for line in own) for name in own[0]["slowest"] if _is(name)}
    by_data, by_computing = (means[name] - means[f"median_{name}"] for name in ("data", "computing"))
    name = "data" if by_data > by_computing else "computing"
    did = {"data": "waits for its data", "computing": "computes"}[name]
    last = own[-1]["slowest"]
    gpu = f", GPU {last['gpu']}" if "gpu" in last else ""
    return (
        f"rank {rank} (host {last['host']}{gpu}) is slower than the rest: it {did} {means[name]:.3g} s of a step, the "
        f"others {means[f'median_{name}']:.3g} s; they wait {lag:.3g} of {seconds:.3g} s for it ({len(own)} of the "
        f"last {len(known)} steps)"
    )


def _is(name: str) -> bool:
    return name.removeprefix("median_") in ("data", "computing")
