"""Why a run stands still that is there, from what its ranks have written down (training/watchdog.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molmo2_nemo.rundir.lines import read_lines
from molmo2_nemo.rundir.paths import HANG


def standstill(stage: Path) -> str | None:
    """In one line, processes that are stopped or in a debugger, for which the run waits without a limit, or how long
    there has been no progress; None where there is some, or where the last half limit has had some.

    Args:
        stage: the folder of a stage that runs.
    """
    attempts = [path for path in (stage / HANG).glob("*") if path.is_dir()]
    if not attempts:
        return None
    newest = max(attempts, key=lambda path: path.stat().st_mtime)
    kinds = {"rank": int, "host": str, "pid": int, "stuck": float, "stopped": list, "held": bool, "words": str}
    places = [line for path in sorted(newest.glob("rank*.json")) for line in read_lines(path, **kinds)]
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


def _names(places: list[dict[str, Any]]) -> str:
    more = f" and {len(places) - 4} more" if len(places) > 4 else ""
    names = [f"rank {place['rank']} (host {place['host']}, process {place['pid']})" for place in places[:4]]
    return f"{', '.join(names)}{more} {'is' if len(places) == 1 else 'are'}"
