"""One HTML page about a run: its stages in a table, curves of loss, speed and fill, what was skipped, the settings.
The page holds everything itself; send it to anybody."""

from __future__ import annotations

import argparse
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.cli.options import check_file
from molmo2_nemo.errors import UserError, writing
from molmo2_nemo.rundir.progress import Progress, duration, read_run
from molmo2_nemo.settings.schema import to_yaml

EXAMPLES = """\
examples:
  molmo2 report runs/8b
  molmo2 report runs/8b --out page.html
"""

POINTS = 700  # of a curve; longer ones are averaged, so that the page stays small
COLOURS = ("#2a6f97", "#c8553d", "#4f8a4b", "#8e6bb0", "#b98b2e", "#4aa3a2", "#a34a6f", "#5b6875", "#7a9a2e", "#d08c8c")

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; margin: 0 auto; max-width: 1080px }
body { padding: 18px 22px 60px }
h1 { font-size: 22px; margin: 0 0 4px }
h2 { font-size: 17px; margin: 30px 0 6px }
.note { color: #5b6875; margin: 0 0 12px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th { text-align: right; font-weight: 600; color: #5b6875; border-bottom: 1px solid #c5ccd3; padding: 3px 6px }
td { text-align: right; padding: 3px 6px; border-bottom: 1px solid #e8ebee; font-variant-numeric: tabular-nums }
th:first-child, td:first-child, td.t { text-align: left; padding-left: 0 }
td, th { white-space: nowrap }
td.t { white-space: normal; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 470px), 1fr)); gap: 22px 26px }
figure { margin: 0 }
figure.first { grid-column: 1 / -1 }
figcaption { color: #5b6875; font-size: 13px }
svg { width: 100%; height: auto; display: block }
summary { cursor: pointer; margin-top: 8px }
pre { font: 12px/1.45 ui-monospace, monospace; background: #f5f6f8; padding: 10px; overflow-x: auto }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="output_dir of a run, or the folder of one stage")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the run's folder)")


def run(args: argparse.Namespace) -> int:
    stages = read_run(args.folder)
    out: Path = args.out or Path(args.folder) / "report.html"
    check_file("--out", out)
    text = page(stages, str(args.folder))
    with writing(out):
        out.write_text(text, encoding="utf-8")
    print(out)
    return 0


def page(stages: Sequence[Progress], title: str) -> str:
    """The whole page.

    Raises:
        UserError: no stage has made a step yet, so there is nothing to show.
    """
    shown = [s for s in stages if s.steps]
    if not shown:
        raise UserError(f"{title}: no stage has made a step yet; molmo2 status {title} says where they are")
    model = shown[0].config.model.preset if shown[0].config else ""
    charts = "".join(figure(draw, shown) for draw in CHARTS)
    sections = [
        f"<h1>{_text(title)}</h1><p class=note>Molmo2 {_text(model)}, {_when(shown)}</p>",
        f"<div class=wide>{table(stages)}</div>",
        "<h2>Curves</h2><p class=note>Optimizer steps, stages one after the other.</p>",
        f"<div class=charts>{charts}</div>",
        incidents(stages),
        "<h2>Settings</h2>",
        *(f"<details><summary>{_text(s.name)}</summary><pre>{_text(to_yaml(s.config))}</pre></details>"
          for s in stages if s.config),
    ]  # fmt: skip
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'>"
    return (
        f"<!doctype html><html lang=en>{head}<title>{_text(title)}</title><style>{STYLE}</style>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def table(stages: Sequence[Progress]) -> str:
    """One row per stage."""
    columns = ("stage", "state", "layout", "steps", "first loss", "last loss", "tokens", "time", "tokens/s", "MFU",
               "fill", "crops")  # fmt: skip
    rows = []
    for stage in stages:
        steps = stage.steps
        losses = [m["loss"] for m in steps if m.get("loss") is not None]
        seconds = sum(m["seconds"] for m in steps)
        tokens = sum(m["tokens"] for m in steps)
        total = f" of {stage.max_steps:,}" if stage.max_steps and stage.step < stage.max_steps else ""
        cells = [
            stage.name,
            stage.state,
            str(stage.attempt.get("layout", "-")),
            f"{stage.step:,}{total}",
            f"{losses[0]:.3f}" if losses else "-",
            f"{losses[-1]:.3f}" if losses else "-",
            _big(tokens),
            duration(seconds) if steps else "-",
            f"{tokens / seconds:,.0f}" if seconds else "-",
            *(_mean(steps, name) for name in ("mfu", "fill", "crop_fill")),
        ]
        rows.append(cells)
    known = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]  # no MFU on CPU, for one
    head = "".join(f"<th>{_text(columns[i])}</th>" for i in known)
    body = "".join(f"<tr>{''.join(f'<td>{_text(row[i])}</td>' for i in known)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def incidents(stages: Sequence[Progress]) -> str:
    """Skipped steps, skipped records, errors."""
    rows = []
    for stage in stages:
        for fault in stage.faults[-20:]:
            records = ", ".join(fault.get("records", [])[:6])
            rows.append((stage.name, f"{fault['step']:,}", f"skipped: {fault['fault']} ({records})"))
        if stage.steps and (count := stage.steps[-1].get("skipped")):
            rows.append((stage.name, "", f"{count:,} records skipped"))
        for error in stage.errors[-5:]:
            rows.append((stage.name, "", f"error: {error['message']}"))
    if not rows:
        return "<h2>Incidents</h2><p class=note>No step and no record was skipped, and nothing failed.</p>"
    body = "".join(f"<tr><td>{_text(a)}</td><td>{_text(b)}</td><td class=t>{_text(c)}</td></tr>" for a, b, c in rows)
    return f"<h2>Incidents</h2><div class=wide><table><tr><th>stage</th><th>step</th><th></th></tr>{body}</table></div>"


# --- charts -------------------------------------------------------------------------------------------------------


def figure(draw: Callable[[Any, Sequence[Progress]], str | None], stages: Sequence[Progress]) -> str:
    """A chart as inline SVG with its caption; nothing where the run has no such figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first = draw is CHARTS[0]
    settings: dict[Any, Any] = {
        "font.size": 10,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "svg.hashsalt": "molmo2",
    }
    with plt.rc_context(settings):
        chart, axes = plt.subplots(figsize=(10.4, 3.9) if first else (5.2, 3.0))
        caption = draw(axes, stages)
        if caption is None:
            plt.close(chart)
            return ""
        _stage_marks(axes, stages)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, ncols=2 if first else 1)
        chart.tight_layout()
        text = io.StringIO()
        chart.savefig(text, format="svg", metadata={"Date": None})
        plt.close(chart)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    kind = " class=first" if first else ""
    return f"<figure{kind}>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def offsets(stages: Sequence[Progress]) -> dict[str, int]:
    """Steps before each stage."""
    found, total = {}, 0
    for stage in stages:
        found[stage.name] = total
        total += stage.step
    return found


def series(stages: Sequence[Progress], value: Callable[[dict[str, Any]], float | None]) -> list[tuple[list, list]]:
    """Points of a figure, one curve per stage: so many that the eye sees no fewer, means where there are more steps."""
    curves = []
    for stage in stages:
        points = [(offsets(stages)[stage.name] + m["step"], value(m)) for m in stage.steps]
        known = [(x, y) for x, y in points if y is not None]
        size = max(1, -(-len(known) // POINTS))
        bins = [known[i : i + size] for i in range(0, len(known), size)]
        means = [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]
        curves.append(([x for x, _ in means], [y for _, y in means]))
    return curves


def _lines(axes: Any, stages: Sequence[Progress], names: dict[str, Callable[[dict[str, Any]], float | None]]) -> bool:
    """A curve for each name, the same colour in all stages; False where none has a point."""
    drawn = False
    for index, (name, value) in enumerate(names.items()):
        label: str | None = name if len(names) > 1 else None
        for x, y in series(stages, value):
            if x:
                dot = "." if len(x) == 1 else ""
                axes.plot(x, y, color=COLOURS[index % len(COLOURS)], linewidth=1.3, marker=dot, label=label)
                label, drawn = None, True
    return drawn


def _loss(axes: Any, stages: Sequence[Progress]) -> str | None:
    if not _lines(axes, stages, {"training": lambda m: m.get("loss")}):
        return None
    names = sorted({name for s in stages for line in s.validation for name in line["losses"]})
    for index, name in enumerate(names, start=1):
        found = [
            (offsets(stages)[s.name] + line["step"], line["losses"].get(name)) for s in stages for line in s.validation
        ]
        known = [(x, y) for x, y in found if y is not None]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*known, strict=True), "o", color=colour, markersize=4, label=f"validation, {name}")
    axes.set_ylim(bottom=0)
    return "Loss: weighted cross entropy and z-loss of each step" + ("; dots: held-out data sets." if names else ".")


def _tasks(axes: Any, stages: Sequence[Progress]) -> str | None:
    names = sorted({name for s in stages for m in s.steps for name in m.get("tasks", {})})
    if len(names) < 2:
        return None
    _lines(axes, stages, {n: lambda m, n=n: m.get("tasks", {}).get(n) for n in names[: len(COLOURS)]})  # type: ignore
    return "Loss by task."


def _norms(axes: Any, stages: Sequence[Progress]) -> str | None:
    groups = ("vit", "connector", "llm")
    if not _lines(axes, stages, {g: lambda m, g=g: m.get(f"grad_norm_{g}") or None for g in groups}):  # type: ignore
        return None
    axes.set_yscale("log")
    return "Gradient norm of each group, before clipping."


def _rates(axes: Any, stages: Sequence[Progress]) -> str | None:
    groups = ("vit", "connector", "llm")
    if not _lines(axes, stages, {g: lambda m, g=g: m.get(f"lr_{g}") or None for g in groups}):  # type: ignore
        return None
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    return "Learning rate of each group."


def _speed(axes: Any, stages: Sequence[Progress]) -> str | None:
    _lines(axes, stages, {"tokens/s": lambda m: m["tokens_per_second"]})
    axes.set_ylim(bottom=0)
    return "Tokens per second, padding not counted."


def _mfu(axes: Any, stages: Sequence[Progress]) -> str | None:
    if not _lines(axes, stages, {"MFU": lambda m: 100 * m["mfu"] if "mfu" in m else None}):
        return None
    axes.set_ylim(bottom=0)
    return "Model FLOPs utilisation in percent; attention counted by the pairs its mask allows."


def _fill(axes: Any, stages: Sequence[Progress]) -> str | None:
    both = {"tokens": lambda m: 100 * m["fill"], "crops": lambda m: 100 * m["crop_fill"] if "crop_fill" in m else None}
    _lines(axes, stages, both)
    axes.set_ylim(0, 103)
    return "Fill of the packs in percent of their two budgets."


def _times(axes: Any, stages: Sequence[Progress]) -> str | None:
    _lines(axes, stages, {"step": lambda m: m["seconds"], "waiting for data": lambda m: m.get("wait")})
    axes.set_ylim(bottom=0)
    return "Seconds of a step, and those of them that it waited for data."


CHARTS = (_loss, _tasks, _norms, _rates, _speed, _mfu, _fill, _times)


def _stage_marks(axes: Any, stages: Sequence[Progress]) -> None:
    if len(stages) < 2:
        return
    for stage in stages:
        start = offsets(stages)[stage.name]
        if start:
            axes.axvline(start, color="0.75", linewidth=0.8, zorder=0)
        middle = start + stage.step / 2
        axes.text(middle, 1.01, stage.name, transform=axes.get_xaxis_transform(), ha="center", color="#5b6875")


def _mean(steps: Sequence[dict[str, Any]], name: str) -> str:
    known = [m[name] for m in steps if m.get(name) is not None]
    return f"{sum(known) / len(known):.0%}" if known else "-"


def _big(count: float) -> str:
    """`61,067`, `9.14 B`."""
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count:,}"


def _when(stages: Sequence[Progress]) -> str:
    import datetime

    times = [m["time"] for s in stages for m in s.steps if "time" in m]
    if not times:
        return "undated"
    first, last = (datetime.datetime.fromtimestamp(t).strftime("%Y-%m-%d %H:%M") for t in (min(times), max(times)))
    return f"{first} to {last}"


def _text(value: object) -> str:
    return html.escape(str(value))
