"""The one page of a prepared run: Markdown, 80 columns, from its results (results.json) alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

WIDTH = 80
HEADING = "# GPU check"  # the first line of every page
MFU = {"train_long": 0.40, "train_sft": 0.42}  # of the 4B at full depth, by mask area
ATTENTION = {  # end of keys of the attention benchmark's summary: how the page calls it, the target
    "share of full": ("attention, share of full flash by pairs", 0.85),
    "mixed packs against dense bias": ("attention, mixed packs over dense bias", 10.0),
    "video against dense bias": ("attention, video over dense bias", 4.0),
}
MEMORY_ERROR, TIME_ERROR = 0.10, 0.20  # most that the planner may be off
STAGES = {"train_sft": "stage 2", "train_long": "stage 3"}


def page(results: dict[str, Any], titles: dict[str, str]) -> str:
    """Args:
    results: `parts` (name, state, seconds, why, data of each), `commit`, `tiny`, `seconds`.
    titles: of every part of a run, in order; those without a result stand as not run.
    """
    found = {part["name"]: part for part in results["parts"]}
    data = {name: part["data"] for name, part in found.items() if part["data"]}
    sections = [
        [HEADING, "", *head(results, data.get("environment", {}))],
        ["## Parts", "", *parts_table(found, titles)],
        ["## Targets", "", *targets_table(targets(data, results["tiny"]))],
        *sections_of(data, results["tiny"]),
        failures(found),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def head(results: dict[str, Any], environment: dict[str, Any]) -> list[str]:
    machine, packages = environment.get("machine", {}), environment.get("packages", {})
    card = environment.get("card") or "no card"
    lines = [f"{card}, {results['seconds']:.0f} s, commit {results['commit'][:12]}."]
    if results["tiny"]:
        lines[0] += " Tiny sizes on a CPU: no figure here says anything about a GPU."
    smi = environment.get("nvidia-smi", {})
    names = ("driver_version", "memory.total", "clocks.max.sm")
    lines += [", ".join(f"{name} {smi[name]}" for name in names if name in smi)]
    versions = {"Python": machine.get("python"), **packages}
    lines += [", ".join(f"{name} {version}" for name, version in versions.items() if version)]
    missing = [name for name, version in packages.items() if not version]
    lines += [f"Not installed: {', '.join(missing)}." if missing else ""]
    return wrapped(line for line in lines if line)


def parts_table(found: dict[str, Any], titles: dict[str, str]) -> list[str]:
    rows = []
    for name, title in titles.items():
        part = found.get(name, {"state": "not run", "seconds": 0.0})
        seconds = f"{part['seconds']:.0f}" if part["seconds"] else "-"
        rows.append((name, part["state"], seconds, shortened(title, 44)))
    return table(("part", "state", "s", "what"), rows)


def targets(data: dict[str, Any], tiny: bool) -> list[tuple[str, str, str, str]]:
    """What, target, measured, verdict: reached, not reached, not run. With tiny sizes nothing is reached."""
    rows = []

    def row(what: str, target: str, value: str | None, reached: bool) -> None:
        verdict = "not run" if value is None else "tiny sizes" if tiny else "reached" if reached else "NOT REACHED"
        rows.append((what, target, value or "-", verdict))

    for part, target in MFU.items():
        value = full_depth(data.get(part, {})).get("mfu")
        shown = None if value is None else f"{value:.1%}"
        row(f"MFU, 4B {STAGES[part]}, full depth", f">= {target:.0%}", shown, (value or 0) >= target)
    summary = data.get("attention", {}).get("summary", {})
    for key, (name, target) in ATTENTION.items():
        value, way = best(summary, key)
        row(name, f">= {target:g}", None if value is None else f"{value:.2f}{way}", (value or 0) >= target)
    for unit, name, most in (("memory_gib", "memory", MEMORY_ERROR), ("seconds", "time", TIME_ERROR)):
        errors = [] if tiny else planner_errors(data, unit)
        worst = max(errors, key=abs, default=None)
        shown = None if worst is None else f"{worst:+.0%}"
        of = f", worst of {len(errors)}" if errors else ""
        row(f"planner's {name}{of}", f"+-{most:.0%}", shown, abs(worst or 0) <= most)
    verdicts = data.get("curve", {}).get("verdicts")
    within = data.get("curve", {}).get("within", False) and data["curve"].get("separates", False)
    row("loss curve within rounding noise", "yes", None if verdicts is None else "yes" if within else "no", within)
    return rows


def best(summary: dict[str, Any], what: str) -> tuple[float | None, str]:
    """The highest figure of a kind in the attention benchmark's summary ("WAY, WHAT"), and the way's name."""
    found = [(row["reached"], key.removesuffix(what).strip(", ")) for key, row in summary.items() if key.endswith(what)]
    value, way = max(found, default=(None, ""))
    return value, f" {way}" if way else ""


def targets_table(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    return table(("target", "wanted", "measured", "verdict"), rows)


def full_depth(result: dict[str, Any]) -> dict[str, Any]:
    """The row of the deepest model of a training part: the full depth, on the line through the measured ones."""
    depths = [row for stage in result.get("stages", {}).values() for row in stage["layers"].values()]
    return depths[-1] if depths and not depths[-1]["measured"] else {}


def planner_errors(data: dict[str, Any], unit: str) -> list[float]:
    """The planner's figure over the measured one, less 1, of every depth that was measured."""
    rows = [row for name in STAGES for row in measured_rows(data.get(name, {}))]
    return [row["planned"][unit] / row[unit] - 1 for row in rows if unit in row["planned"] and row[unit]]


def measured_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for stage in result.get("stages", {}).values() for r in stage["layers"].values() if r["measured"]]


def sections_of(data: dict[str, Any], tiny: bool) -> list[list[str]]:
    """What each part found, where it found something."""
    steps = [(name, data[name]) for name in ("train_sft", "train_long", "depth", "offload") if name in data]
    made = [
        ("Training steps", training(steps, tiny)),
        ("Attention", attention(data.get("attention", {}))),
        ("Fast pieces and their plain twins", kernels(data.get("kernels", {}))),
        ("Ceilings", ceilings(data.get("probe", {}))),
        ("Loss curve", curve(data.get("curve", {}))),
    ]
    sections = [[f"## {title}", "", *lines] for title, lines in made if lines]
    for name, result in steps:
        for stage in result.get("stages", {}).values():
            if text := stage.get("profile"):
                sections.append([f"## Profile of {name}", "", *profile(text)])
    return sections


def training(steps: Sequence[tuple[str, dict[str, Any]]], tiny: bool) -> list[str]:
    """Measured depths, and the full one on their line (~); the planner's figures beside them."""
    rows, notes = [], []
    for name, result in steps:
        for stage in result.get("stages", {}).values():
            for layers, row in stage["layers"].items():
                rows.append((name.removeprefix("train_"), layers, *step_cells(row, tiny)))
                if off := row.get("off the line"):
                    notes.append(f"{name}: {layers} layers lie {off['seconds']:+.1%} (time) off the line.")
    if extra := depth_check(dict(steps)):
        notes.append(extra)
    if not rows:
        return []
    heading = ("part", "layers", "s (planned)", "tokens/s", "TFLOP/s", "MFU", "GiB (planned)")
    return [*table(heading, rows), *(["", *wrapped(notes)] if notes else [])]


def step_cells(row: dict[str, Any], tiny: bool) -> tuple[str, ...]:
    mark, plan = "" if row["measured"] else "~", row["planned"]
    seconds = f" ({plan['seconds']:.2f})" if "seconds" in plan else ""
    memory = f" ({plan['memory_gib']:.1f})" if "memory_gib" in plan else ""
    return (
        f"{mark}{row['seconds']:.2f}{seconds}",
        f"{mark}{row['tokens_per_second']:,.0f}",
        f"{mark}{row['tflops']:.3g}",
        "-" if row["mfu"] is None else f"{mark}{row['mfu']:.1%}",
        ("-" if tiny else f"{mark}{row['memory_gib']:.1f}") + memory,
    )


def depth_check(steps: dict[str, dict[str, Any]]) -> str:
    """How far the depth that was measured by itself lies from the line through the others of its stage."""
    others = {int(n): row for n, row in stage_layers(steps.get("train_sft", {})).items() if row["measured"]}
    extra = {int(n): row for n, row in stage_layers(steps.get("depth", {})).items() if row["measured"]}
    if len(others) < 2 or not extra:
        return ""
    low, high = min(others), max(others)
    layers, row = next(iter(extra.items()))
    slope = (others[high]["seconds"] - others[low]["seconds"]) / (high - low)
    expected = others[low]["seconds"] + slope * (layers - low)
    off = row["seconds"] / expected - 1
    return f"{layers} layers at stage 2 take {off:+.1%} against the line through {low} and {high}."


def stage_layers(result: dict[str, Any]) -> dict[str, Any]:
    return next(iter(result.get("stages", {}).values()), {}).get("layers", {})


def attention(result: dict[str, Any]) -> list[str]:
    rows = []
    for kind in ("mixed", "video"):
        for pack in result.get(kind, []):
            for name, seconds in pack["seconds"].items():
                faster = pack["times faster than dense bias"].get(name, {}).get("both")
                times = f"{faster:.1f}x" if faster else "-"
                ms = [f"{1e3 * seconds[part]:.2f}" for part in ("forward", "backward")]
                rate = f"{pack['TFLOP/s'][name]['both']:.3g}"
                rows.append((f"{kind} {pack['tokens']:,}", name, *ms, rate, times))
    return table(("pack", "way", "forward ms", "backward ms", "TFLOP/s", "dense"), rows) if rows else []


def kernels(result: dict[str, Any]) -> list[str]:
    """Every piece by every way: milliseconds forward and backward, memory, and against the plain way."""
    rows, plain = [], {}
    for row in result.get("rows", []):
        if row["way"] == "plain":
            plain[row["piece"]] = row.get("seconds")
        if "seconds" not in row:
            rows.append((row["piece"], row["way"], "-", "-", shortened(row.get("cannot run", "-"), 32)))
            continue
        slow = plain.get(row["piece"])
        times = f"{slow / row['seconds']:.2f}x" if slow else "-"
        memory = "-" if row.get("peak") is None else f"{row['peak'] / 2**20:.0f}"
        rows.append((row["piece"], row["way"], f"{1e3 * row['seconds']:.2f}", memory, times))
    return table(("piece", "way", "ms", "MiB", "against plain"), rows) if rows else []


def ceilings(result: dict[str, Any]) -> list[str]:
    rows = []
    for name, figures in result.get("figures", {}).items():
        if "error" in figures:
            rows.append((name, "failed", shortened(figures["error"], 30)))
        else:
            rate = next((f"{value:.3g} {unit}" for unit, value in figures.items() if unit != "ms"), "-")
            rows.append((name, f"{figures['ms']:.2f}", rate))
    return table(("what", "ms", "rate"), rows) if rows else []


def curve(result: dict[str, Any]) -> list[str]:
    rows = [
        (name, f"{row['distance']:.1e}", f"{row['allowed']:.1e}", "within" if row["within"] else "outside")
        for name, row in result.get("verdicts", {}).items()
    ]
    if not rows:
        return []
    notes = wrapped(
        [
            "Largest difference of losses over the steps, against the CPU's curves in several orders of summation; "
            "the higher rate is the control, which must lie outside."
        ]
    )
    return [*table(("curve", "distance", "allowed", "verdict"), rows), "", *notes]


def profile(text: str) -> list[str]:
    """The table by kind of kernel that log.profile writes, without the single kernels."""
    lines = text.splitlines()
    end = next((n for n, line in enumerate(lines) if "the largest" in line), len(lines))
    first = next((n for n, line in enumerate(lines) if line.rstrip().endswith("kind")), end)
    kinds = [line[: WIDTH - 1] for line in lines[first:end]]
    return [*wrapped([" ".join(lines[:first])]), "", "```", *kinds, "```"]


def failures(found: dict[str, Any]) -> list[str]:
    """Why parts did not pass, a line each."""
    bad = [part for part in found.values() if part["state"] != "passed"]
    if not bad:
        return []
    notes = [f"- {part['name']}, {part['state']}: {shortened(part['why'], 300)}" for part in bad]
    return ["## What did not pass", "", *wrapped(notes)]


def table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table in Markdown, columns aligned; the first is cut where the whole would be wider than a page."""
    cells = [tuple(map(str, row)) for row in (heading, *rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(heading))]
    over = sum(widths) + 3 * len(widths) + 1 - WIDTH
    if over > 0:
        widths[0] = max(4, widths[0] - over)
    lines = [
        "| " + " | ".join(shortened(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def shortened(text: str, width: int) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[: max(1, width - 2)] + ".."


def wrapped(lines: Iterable[str]) -> list[str]:
    return [
        part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  " * line.startswith("- "))
    ]
