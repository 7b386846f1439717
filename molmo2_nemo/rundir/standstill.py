"""Why a run stands still that is there, from what its ranks have written down (training/watchdog.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.rundir.lines import read_lines
from molmo2_nemo.rundir.paths import HANG


def standstill(stage: Path, attempt: Mapping[str, Any]) -> str | None:
    """In one line, processes that are stopped or in a debugger, for which the run waits without a limit, or how long
    there has been no progress; None where there is some, where the last half limit has had some, or where nobody
    watches (faults.hang_seconds=0).

    Args:
        stage: the folder of a stage that runs.
        attempt: its attempt.json, whose process is rank 0: what earlier attempts that hung wrote down is not of it.
    """
    places = next((found for path in (stage / HANG).glob("*") if _is_of(found := _places(path), attempt)), [])
    asleep = {rank for place in places for rank in place["stopped"]}
    if stopped := [place for place in places if place["rank"] in asleep]:
        hint = f"kill -CONT {stopped[0]['pid']} on {stopped[0]['host']} lets it go on"
        return f"the run stands still: {_names(stopped)} stopped (SIGSTOP, Ctrl-Z) or in a debugger; {hint}"
    if held := [place for place in places if place["held"]]:
        return f"the run stands still: {_names(held)} in a debugger"
    if stuck := [place for place in places if place["stuck"]]:
        longest = max(stuck, key=lambda place: float(place["stuck"]))
        return (
            f"no progress for {longest['stuck']:.0f} s on {len(stuck)} of {len(places)} ranks, such as rank "
            f"{longest['rank']} at {longest['words']}"
        )
    return None


def _places(folder: Path) -> list[dict[str, Any]]:
    """Where the ranks of an attempt are."""
    kinds = {"rank": int, "host": str, "pid": int, "stuck": float, "stopped": list, "held": bool, "words": str}
    return [line for path in sorted(folder.glob("rank?????.json")) for line in read_lines(path, **kinds)]


def _is_of(places: Sequence[Mapping[str, Any]], attempt: Mapping[str, Any]) -> bool:
    """Whether rank 0 of an attempt is the process that attempt.json names."""
    process = attempt.get("host"), attempt.get("pid"), attempt.get("started")
    return any(place["rank"] == 0 and (place["host"], place["pid"], place.get("began")) == process for place in places)


def _names(places: list[dict[str, Any]]) -> str:
    more = f" and {len(places) - 4} more" if len(places) > 4 else ""
    names = [f"rank {place['rank']} (host {place['host']}, process {place['pid']})" for place in places[:4]]
    return f"{', '.join(names)}{more} {'is' if len(places) == 1 else 'are'}"
