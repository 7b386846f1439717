"""Saved states of the data stream, one per data-parallel rank, and which examples they show as not yet used."""

from __future__ import annotations

from typing import Any

from molmo2_nemo.data.pieces import without
from molmo2_nemo.errors import DataError

STATE_VERSION = 2


def merge_states(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check the saved states and return one per data-parallel rank, in order of rank."""
    if not states:
        raise DataError("the checkpoint holds no state of the data stream")
    by_rank: dict[int, dict[str, Any]] = {}
    for state in states:
        if state.get("version") != STATE_VERSION:
            raise DataError(
                f"data state of version {state.get('version')!r}; this molmo2 reads version {STATE_VERSION}"
            )
        rank = state["dp_rank"]
        if by_rank.setdefault(rank, state) != state:
            raise DataError(f"two different data states of data-parallel rank {rank}; the checkpoint is inconsistent")
    size = states[0]["dp_size"]
    if any(s["dp_size"] != size or s["identity"] != states[0]["identity"] for s in states):
        raise DataError("the data states come from different runs (their dp_size, seed or data sets differ)")
    if sorted(by_rank) != list(range(size)):
        missing = sorted(set(range(size)) - set(by_rank))
        raise DataError(f"the checkpoint lacks the data state of data-parallel rank {missing[0]} of {size}")
    return [by_rank[rank] for rank in range(size)]


def unread(by_rank: list[dict[str, Any]]) -> tuple[list[int], int]:
    """Stream numbers below `start` that no batch has used yet, ascending, and `start`, from which no rank has read.
    Of a document that was used in part, the number of the rest (pieces.py).

    A state of `CostOrder` (ordering.py) is that of an earlier batch; its `ahead` names the examples used since, and how
    far the rank had read.
    """
    size = len(by_rank)
    start = max(state.get("ahead", state)["position"] for state in by_rank)
    left: set[int] = set()
    for state in by_rank:
        left.update(state["backlog"])
        left.update(number for number, _ in state["packer"]["waiting"])
        left.update(range(state["position"], start, size))
    used = [number for state in by_rank for number in state.get("ahead", {}).get("used", ())]
    return without(left, used), start


def check_identity(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Check that a saved state was made with the same seed, data sets and sampling rates.

    Raises:
        DataError: they differ; the message names the difference.
    """
    if saved == own:
        return
    if saved.get("seed") != own["seed"]:
        raise DataError(f"the saved run used data.seed={saved.get('seed')}, this one {own['seed']}; use the saved one")
    before, now = saved["sources"], own["sources"]
    for name in sorted(set(before) | set(now)):
        if before.get(name) != now.get(name):
            raise DataError(
                f"data set {name!r} is not the one of the saved run (fingerprint, records, rate: then "
                f"{before.get(name)}, now {now.get(name)}){_added_to(before.get(name), now.get(name))}; restore it, or "
                "start a new run from the weights"
            )


def _added_to(before: Any, now: Any) -> str:
    """What is likely where a data set has other records than before."""
    if not before or not now or before[0] == now[0]:
        return ""
    return ", as molmo2 prepare was called again since and added to it, or it was made anew"
