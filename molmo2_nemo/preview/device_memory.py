"""The GPU's memory in a run's report: who held it at the peak, and over the time that the allocator's history has."""

from __future__ import annotations

import datetime
import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import file_error, sized, unit_of
from molmo2_nemo.preview.curves import COLOURS, at_both_widths, drawn
from molmo2_nemo.rundir.paths import MEMORY
from molmo2_nemo.rundir.progress import StageProgress

DRAWN = 4  # ranks of one moment; of the others there is a line each
LARGEST = 2**63  # bytes, or events, and more than there can be


def section(stages: Sequence[StageProgress]) -> str:
    """The section as HTML; "" where no snapshot was written."""
    parts = [part for stage in stages for part in _of_stage(stage)]
    return f"<h2>GPU memory</h2>{''.join(parts)}" if parts else ""


def _of_stage(stage: StageProgress) -> Iterator[str]:
    moments: dict[str, list[tuple[int, Path]]] = {}
    for path in (stage.folder / MEMORY).glob("*.json"):
        moment, _, written = path.stem.rpartition(".rank-")
        if written.isdecimal():
            moments.setdefault(moment, []).append((int(written), path))
    for moment, ranks in sorted(moments.items()):
        when = moment.replace("-", " ", 1 if moment.startswith("steps") else -1)
        for number, (rank, path) in enumerate(sorted(ranks)):
            title = f"{stage.name}, rank {rank}, {when}"
            found = _read(path)
            said = found if isinstance(found, str) else summary(found)
            drawn_too = "" if isinstance(found, str) or number >= DRAWN else f"{_figure(found, title)}{table(found)}"
            note = f"{said} Written {_written(path)}."
            yield f"<h3>{_text(title)}</h3><p class=note>{_text(note)}</p>{drawn_too}"


def _read(path: Path) -> dict[str, Any] | str:
    """The figures of a snapshot; in words what is wrong, where the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return file_error(error)
    except (ValueError, RecursionError) as error:
        return f"{path} is damaged ({error}); remove it"
    fault = _fault(found)
    return found if fault is None else f"{path} is damaged (its {fault}); remove it"


def _written(path: Path) -> str:
    """When: a file stays until another of its name comes, also of an attempt before the last."""
    return datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")


def _fault(found: Any) -> str | None:
    """What of the figures is not as training/memory_history.py writes it; None where all is."""
    if not isinstance(found, dict):
        return "outermost value"
    for name in ("reserved", "allocated", "peak", "events"):
        if not _is_size(found.get(name)):
            return name
    failed, places, at = found.get("failed", ""), found.get("places"), found.get("at", "")
    if failed is not None and not (
        isinstance(failed, dict)
        and all(_is_size(failed.get(name)) for name in ("wanted", "free"))
        and isinstance(failed.get("place"), str)
    ):
        return "failed"
    if not isinstance(places, list) or not all(map(_is_place, places)) or (found["events"] and not places):
        return "places"
    moments = {len(place["points"]) for place in places}
    seconds = isinstance(at, list) and all(isinstance(each, int | float) and abs(each) < LARGEST for each in at)
    if len(moments) > 1 or 0 in moments or not (at is None or seconds):
        return "points"
    if at is not None and found["events"] and {len(at)} != moments:
        return "at"
    return None if isinstance(found.get("whole"), bool) else "whole"


def _is_place(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and _is_size(value.get("at_peak"))
        and isinstance(value.get("points"), list)
        and all(map(_is_size, value["points"]))
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def summary(found: dict[str, Any]) -> str:
    """What happened, in words."""
    held = (
        f"{sized(found['allocated'])} in use at the end, of {sized(found['reserved'])} that PyTorch had of the device"
    )
    words = [held]
    if (failed := found["failed"]) is not None:
        asked = f"{sized(failed['wanted'])} were asked for by {failed['place']}"
        words.insert(0, f"Memory ran out: {asked}, {sized(failed['free'])} were free")
    if found["events"]:
        older = "" if found["whole"] else ", older ones are not kept"
        words.append(f"peak {sized(found['peak'])} in {found['events']:,} allocations and frees{older}")
    else:
        words.append("who asked for it: log.record_memory_history=true")
    return "; ".join(words) + "."


def table(found: dict[str, Any]) -> str:
    """Who held how much at the peak, with its colour in the picture; "" without a history."""
    if not found["events"]:
        return ""
    rows = "".join(
        f"<tr><td class=t><span style='color:{colour}'>&#9632;</span> {_text(place['name']).replace('/', '/<wbr>')}"
        f"</td><td>{sized(place['at_peak'])}</td><td>{place['at_peak'] / max(1, found['peak']):.0%}</td></tr>"
        for place, colour in zip(found["places"], COLOURS, strict=False)
    )
    head = "<tr><th>asked for by</th><th>at the peak</th><th>share</th></tr>"
    return f"<div class=wide><table>{head}{rows}</table></div>"


def _figure(found: dict[str, Any], title: str) -> str:
    unit, name = unit_of(found["peak"])

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

    return at_both_widths(lambda size: drawn(paint, size, title))


def _text(value: object) -> str:
    return html.escape(str(value))
