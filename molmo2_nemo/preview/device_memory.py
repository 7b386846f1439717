"""The GPU's memory in a run's report: who held it at the peak, and over the time that the allocator's history has."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.preview.curves import COLOURS, SLIM, WIDE, drawn
from molmo2_nemo.rundir.paths import MEMORY
from molmo2_nemo.rundir.progress import StageProgress

NEEDED = {"reserved", "allocated", "peak", "events", "places", "at", "failed", "rank", "whole"}


def section(stages: Sequence[StageProgress]) -> str:
    """The section as HTML; "" where no snapshot was written."""
    parts = [part for stage in stages for part in _of_stage(stage)]
    return f"<h2>GPU memory</h2>{''.join(parts)}" if parts else ""


def _of_stage(stage: StageProgress) -> Iterator[str]:
    for path in sorted((stage.folder / MEMORY).glob("*.json")):
        if (found := _read(path)) is not None:
            when = path.stem.rpartition(".rank-")[0].replace("-", " ", 1 if path.stem.startswith("steps") else -1)
            title = f"{stage.name}, rank {found['rank']}, {when}"
            head = f"<h3>{_text(title)}</h3><p class=note>{_text(summary(found))}</p>"
            yield f"{head}{_figure(found, title)}{table(found)}"


def _read(path: Path) -> dict[str, Any] | None:
    """The figures of a snapshot; None where the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and set(found) >= NEEDED else None


def summary(found: dict[str, Any]) -> str:
    """What happened, in words."""
    held = (
        f"{_size(found['allocated'])} in use at the end, of {_size(found['reserved'])} that PyTorch had of the device"
    )
    words = [held]
    if (failed := found["failed"]) is not None:
        free = f", {_size(failed['free'])} were free" if failed["free"] is not None else ""
        words.insert(0, f"Memory ran out: {_size(failed['wanted'])} were asked for by {failed['place']}{free}")
    if found["events"]:
        older = "" if found["whole"] else ", older ones are not kept"
        words.append(f"peak {_size(found['peak'])} in {found['events']:,} allocations and frees{older}")
    else:
        words.append("who asked for it: log.record_memory_history=true")
    return "; ".join(words) + "."


def table(found: dict[str, Any]) -> str:
    """Who held how much at the peak, with its colour in the picture; "" without a history."""
    if not found["events"]:
        return ""
    rows = "".join(
        f"<tr><td class=t><span style='color:{colour}'>&#9632;</span> {_text(place['name']).replace('/', '/<wbr>')}"
        f"</td><td>{_size(place['at_peak'])}</td><td>{place['at_peak'] / max(1, found['peak']):.0%}</td></tr>"
        for place, colour in zip(found["places"], COLOURS, strict=False)
    )
    head = "<tr><th>asked for by</th><th>at the peak</th><th>share</th></tr>"
    return f"<div class=wide><table>{head}{rows}</table></div>"


def _figure(found: dict[str, Any], title: str) -> str:
    unit, name = _unit(found["peak"])

    def paint(axes: Any) -> str | None:
        if not found["events"]:
            return None
        at = found["at"] if found["at"] is not None else range(len(found["places"][0]["points"]))
        layers = [[size / unit for size in place["points"]] for place in found["places"]]
        axes.stackplot(at, *layers, colors=COLOURS, linewidth=0, step="post")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("seconds" if found["at"] is not None else "allocations and frees")
        axes.set_ylabel(f"{name} in use")
        axes.margins(x=0)
        return "Memory in use, by the function that asked for it; each point the fullest moment of its part."

    (wide, caption), (slim, _) = drawn(paint, WIDE, title), drawn(paint, SLIM, title)
    both = f"<div class=broad>{wide}</div><div class=slim>{slim}</div>"
    return f"<figure>{both}<figcaption>{_text(caption)}</figcaption></figure>" if wide else ""


def _unit(size: int) -> tuple[int, str]:
    return (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")


def _size(size: int) -> str:
    unit, name = _unit(size)
    return f"{size / unit:,.1f} {name}"


def _text(value: object) -> str:
    return html.escape(str(value))
