"""Who held a GPU's memory, and when: what the report draws, from a snapshot of PyTorch's CUDA allocator.

A snapshot (`torch.cuda.memory._snapshot()`, whose docstring has its fields) lists the blocks that are allocated now
and, if the allocator kept a history, the latest allocations and frees, each with the Python stack that asked.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import PurePath
from typing import Any

POINTS = 300  # of the drawing; each is the fullest moment of its part of the history
PLACES = 9  # that are drawn, those that hold the most at the peak; the rest is OTHERS
BEFORE = "allocated before the history begins"
NO_STACK = "no Python stack (the backward pass, libraries)"
OTHERS = "all other places"
KNOWN = (("molmo2_nemo",), ("megatron",), ("nemo",), ("transformer_engine",), ("apex",), ("torch", "optim"))

Change = tuple[str, int]  # a place, and the bytes that it took (gave back: below 0)


def timeline(snapshot: dict[str, Any], device: int = 0) -> dict[str, Any]:
    """What happened on one device, in bytes.

    Returns:
        `reserved`, what the allocator has of the device at the end, and `allocated`, how much of that is in use;
        `peak`, the most in use during the history; `events`, how many allocations and frees that is; `places`, the
        largest at the peak first, each with its `name`, `at_peak` and `points`, its bytes at each of at most POINTS
        moments; `at`, the moments' seconds since the first event (None: the allocator kept no times).
    """
    segments = [segment for segment in snapshot["segments"] if segment["device"] == device]
    traces = snapshot["device_traces"]
    events = [event for event in (traces[device] if device < len(traces) else ()) if event["action"] in _CHANGES]
    used = sum(_bytes(block) for s in segments for block in s["blocks"] if block["state"].startswith("active"))
    changes = _changes(events)
    totals = list(accumulate((size for _, size in changes), initial=used - sum(size for _, size in changes)))
    moments = _fullest(totals)
    held = _held(changes, totals[0], moments)
    peak = max(moments, key=lambda moment: totals[moment])
    largest = [name for name, size in held[peak].most_common(PLACES) if size > 0]
    return {
        "reserved": sum(segment["total_size"] for segment in segments),
        "allocated": used,
        "peak": totals[peak],
        "events": len(events),
        "at": _seconds(events, moments),
        "places": [_of_place(name, held, moments, peak) for name in largest] + _others(largest, held, moments, peak),
    }


def place(frames: Sequence[dict[str, Any]]) -> str:
    """Where a stack (innermost first) asked for memory: the innermost function of this project, Megatron-core, NeMo or
    an optimizer, as `molmo2_nemo/model/decoder.py forward`."""
    for frame in frames:
        if (file := _known(frame["filename"])) is not None:
            return f"{file} {frame['name']}"
    return NO_STACK


@functools.cache
def _known(filename: str) -> str | None:
    """A file of KNOWN below the folder of its package's; None for others. A history asks millions of times."""
    parts = PurePath(filename).parts
    parts = parts[max((i + 1 for i, part in enumerate(parts) if part.endswith("-packages")), default=0) :]
    for known in KNOWN:
        starts = [i for i in range(len(parts)) if parts[i : i + len(known)] == known]
        if starts:
            return "/".join(parts[starts[-1] :])
    return None


_CHANGES = ("alloc", "free_completed")


def _bytes(block: dict[str, Any]) -> int:
    """What was asked for: as events have it, without what a block is larger."""
    return int(block.get("requested_size", block["size"]))


def _changes(events: Sequence[dict[str, Any]]) -> list[Change]:
    taken: dict[int, Change] = {}
    changes: list[Change] = []
    for event in events:
        if event["action"] == "alloc":
            taken[event["addr"]] = place(event.get("frames", ())), event["size"]
            changes.append(taken[event["addr"]])
        else:
            name, size = taken.pop(event["addr"], (BEFORE, event["size"]))
            changes.append((name, -size))
    return changes


def _fullest(totals: Sequence[int]) -> list[int]:
    """Of each of POINTS parts, the index at which the most is in use."""
    parts = min(POINTS, len(totals))
    bounds = [len(totals) * part // parts for part in range(parts + 1)]
    return [max(range(start, end), key=totals.__getitem__) for start, end in zip(bounds, bounds[1:], strict=False)]


def _held(changes: Sequence[Change], at_first: int, moments: Sequence[int]) -> dict[int, Counter[str]]:
    """By moment, the bytes of every place; moment 0 is before the first change."""
    wanted, held = set(moments), Counter({BEFORE: at_first})
    found = {0: Counter(held)} if 0 in wanted else {}
    for index, (name, size) in enumerate(changes, start=1):
        held[name] += size
        if index in wanted:
            found[index] = Counter(held)
    return found


def _of_place(name: str, held: dict[int, Counter[str]], moments: Sequence[int], peak: int) -> dict[str, Any]:
    return {"name": name, "at_peak": held[peak][name], "points": [max(0, held[moment][name]) for moment in moments]}


def _others(
    largest: Sequence[str], held: dict[int, Counter[str]], moments: Sequence[int], peak: int
) -> list[dict[str, Any]]:
    rest = {
        moment: Counter({OTHERS: held[moment].total() - sum(held[moment][n] for n in largest)}) for moment in moments
    }
    row = _of_place(OTHERS, rest, moments, peak)
    return [row] if any(row["points"]) else []


def _seconds(events: Sequence[dict[str, Any]], moments: Sequence[int]) -> list[float] | None:
    if not all("time_us" in event for event in events):
        return None
    times = [event["time_us"] for event in events]
    return [(times[max(0, moment - 1)] - times[0]) / 1e6 for moment in moments] if times else []
