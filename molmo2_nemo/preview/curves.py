"""Curves of a run's stages as inline SVG: loss, gradient norms, learning rates, speed, fill."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from molmo2_nemo.rundir.progress import StageProgress
from molmo2_nemo.settings.run import BESIDE_ADAPTERS, OPTIMIZER_GROUPS

POINTS = 700  # of a curve; longer curves are averaged, so that the page stays small
COLOURS = ("#2a6f97", "#c8553d", "#4f8a4b", "#8e6bb0", "#b98b2e", "#4aa3a2", "#a34a6f", "#5b6875", "#7a9a2e", "#d08c8c")


WIDE, SLIM, SMALL = (10.4, 3.9), (4.4, 3.4), (4.4, 2.9)  # inches; the first chart is wide, and slim on a phone
LEGEND_ROW = 0.18  # inches


Chart = Callable[[Any, Sequence[StageProgress]], str | None]  # draws on axes; gives the caption, None: no values


def figure(draw: Chart, stages: Sequence[StageProgress]) -> str:
    """A chart as inline SVG with its caption; "" where the run has no values for it. The first chart is drawn twice, of
    which the page's style shows the one that the screen has room for: text in a picture shrinks with it."""
    if draw is not CHARTS[0]:
        svg, caption = _drawn(draw, stages, SMALL)
        return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" if svg else ""
    return at_both_widths(lambda size: _drawn(draw, stages, size), " class=first")


def at_both_widths(picture: Callable[[tuple[float, float]], tuple[str, str]], attributes: str = "") -> str:
    """A figure whose picture (SVG and caption of a size) stands there for a wide screen and for a phone, of which the
    page's style shows one; "" where there is nothing to draw."""
    (wide, caption), (slim, _) = picture(WIDE), picture(SLIM)
    both = f"<div class=broad>{wide}</div><div class=slim>{slim}</div>"
    return f"<figure{attributes}>{both}<figcaption>{html.escape(caption)}</figcaption></figure>" if wide else ""


def _drawn(draw: Chart, stages: Sequence[StageProgress], size: tuple[float, float]) -> tuple[str, str]:
    """A chart over the run's steps."""

    def over_steps(axes: Any) -> str | None:
        caption = draw(axes, stages)
        if caption is not None:
            _stage_marks(axes, stages)
            axes.set_xlim(0, 1.02 * max(1, sum(stage.step for stage in stages)))  # also where few steps have values
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel("optimizer step")
        return caption

    return drawn(over_steps, size, name=draw.__name__)


def drawn(paint: Callable[[Any], str | None], size: tuple[float, float], name: str) -> tuple[str, str]:
    """SVG and caption; empty ones where there is nothing to draw.

    Args:
        paint: draws on axes and gives the caption, None if there is nothing.
        size: in inches, width and height.
        name: of the picture, one of those of a page.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    settings: dict[Any, Any] = {
        "font.size": 10,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "svg.hashsalt": f"molmo2 {name} {size}",  # of names inside the picture: one page holds several
    }
    with plt.rc_context(settings):
        chart, axes = plt.subplots(figsize=size, layout="constrained")
        axes.xaxis.set_major_locator(MaxNLocator(7 if size == WIDE else 4))
        caption = paint(axes)
        if caption is None:
            plt.close(chart)
            return "", ""
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_locator(_logarithmic(*axes.get_ylim()))
            axes.yaxis.set_minor_formatter("")
        # in full: an exponent of all the ticks would stand above the axis, where the stages have their names
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        axes.set_axisbelow(True)
        _legend(chart, axes, size)
        text = io.StringIO()
        chart.savefig(text, format="svg", metadata={"Date": None})
        plt.close(chart)
    return text.getvalue()[text.getvalue().index("<svg") :], caption


def _logarithmic(low: float, high: float) -> Any:
    """A locator of 3 to 8 ticks between two limits of a logarithmic axis, of powers of ten where there are 3."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        shown = [tick for tick in ticks if low <= tick <= high]
        if len(shown) >= 3:
            return FixedLocator(shown[:: -(-len(shown) // 8)])
    return MaxNLocator(4)


def _legend(chart: Any, axes: Any, size: tuple[float, float]) -> None:
    """A legend below the axes, where it hides no curve; the chart grows by its rows."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = max(1, int(14 * size[0] / (max(map(len, labels)) + 8)))  # 14 letters an inch; 8 for a line and gaps
    chart.set_size_inches(size[0], size[1] + LEGEND_ROW * -(-len(labels) // columns))
    chart.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=9, ncols=columns)


def offsets(stages: Sequence[StageProgress]) -> dict[str, int]:
    """Number of steps before each stage."""
    found, total = {}, 0
    for stage in stages:
        found[stage.name] = total
        total += stage.step
    return found


def series(stages: Sequence[StageProgress], value: Callable[[dict[str, Any]], float | None]) -> list[tuple[list, list]]:
    """(steps, values) of a metric, one curve per stage; averaged for a stage with more than POINTS steps."""
    curves, before = [], offsets(stages)
    for stage in stages:
        points = [(before[stage.name] + m["step"], value(m)) for m in stage.steps]
        known = [(x, y) for x, y in points if y is not None]
        size = max(1, -(-len(known) // POINTS))
        bins = [known[i : i + size] for i in range(0, len(known), size)]
        means = [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]
        curves.append(([x for x, _ in means], [y for _, y in means]))
    return curves


def _lines(
    axes: Any, stages: Sequence[StageProgress], names: dict[str, Callable[[dict[str, Any]], float | None]]
) -> bool:
    """Draw a curve for each name, in the same colour in all stages; names whose curves coincide everywhere share one.
    Returns whether any has a point."""
    curves = {name: series(stages, value) for name, value in names.items()}
    together: list[list[str]] = []
    for name in curves:
        if not any(x for x, _ in curves[name]):
            continue
        same = next((group for group in together if curves[group[0]] == curves[name]), None)
        if same is None:
            together.append([name])
        else:
            same.append(name)
    for group in together:
        index = list(names).index(group[0])
        label: str | None = ", ".join(group) if len(names) > 1 else None
        for x, y in curves[group[0]]:
            if x:
                dot = "." if len(x) == 1 else ""
                axes.plot(x, y, color=COLOURS[index % len(COLOURS)], linewidth=1.3, marker=dot, label=label)
                label = None
    return bool(together)


def _loss(axes: Any, stages: Sequence[StageProgress]) -> str | None:
    if not _lines(axes, stages, {"training": lambda m: m.get("loss")}):
        return None
    names, before = sorted({name for s in stages for line in s.validation for name in line["losses"]}), offsets(stages)
    for index, name in enumerate(names, start=1):
        found = [(before[s.name] + line["step"], line["losses"].get(name)) for s in stages for line in s.validation]
        known = [(x, y) for x, y in found if y is not None]
        if not known:
            continue
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*known, strict=True), "o", color=colour, markersize=4, label=f"validation, {name}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss in nats")
    return "Loss: weighted cross entropy and z-loss of each step" + ("; dots: held-out data sets." if names else ".")


def _tasks(axes: Any, stages: Sequence[StageProgress]) -> str | None:
    names = sorted({name for s in stages for m in s.steps for name in m.get("tasks", {})})
    if len(names) < 2:
        return None
    _lines(axes, stages, {n: lambda m, n=n: m.get("tasks", {}).get(n) for n in names[: len(COLOURS)]})  # type: ignore
    axes.set_ylabel("loss in nats")
    return "Loss by task."


def _scores(axes: Any, stages: Sequence[StageProgress]) -> str | None:
    lines = [(s, line) for s in stages for line in s.evaluations]
    names, before = sorted({name for _, line in lines for name in line["groups"]}), offsets(stages)
    for colour, name in zip(COLOURS, names, strict=False):
        found = [(before[s.name] + line["step"], line["groups"].get(name)) for s, line in lines]
        known = [(x, 100 * y) for x, y in found if y is not None]
        axes.plot(*zip(*known, strict=True), "o-", color=colour, markersize=4, linewidth=1.2, label=name)
    axes.set_ylim(0, 100)
    axes.set_ylabel("score in %")
    return "Scores of evaluation.tasks in percent, the mean of each group." if names else None


def _of_groups(figure: str) -> dict[str, Callable[[dict[str, Any]], float | None]]:
    """A metric that a line of the log has for every optimizer group; 0 counts as missing."""
    groups = (*OPTIMIZER_GROUPS, BESIDE_ADAPTERS)
    return {group: lambda m, key=f"{figure}_{group}": m.get(key) or None for group in groups}  # type: ignore


def _norms(axes: Any, stages: Sequence[StageProgress]) -> str | None:
    if not _lines(axes, stages, _of_groups("grad_norm")):
        return None
    axes.set_yscale("log")
    axes.set_ylabel("norm")
    return "Gradient norm of each group, before clipping."


def _learning_rates(axes: Any, stages: Sequence[StageProgress]) -> str | None:
    if not _lines(axes, stages, _of_groups("lr")):
        return None
    axes.set_ylabel("learning rate")
    return "Learning rate of each group."


def _speed(axes: Any, stages: Sequence[StageProgress]) -> str | None:
    _lines(axes, stages, {"tokens/s": lambda m: m["tokens_per_second"]})
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens/s")
    return "Tokens per second, padding not counted."


def _mfu(axes: Any, stages: Sequence[StageProgress]) -> str | None:
    if not _lines(axes, stages, {"MFU": lambda m: 100 * m["mfu"] if "mfu" in m else None}):
        return None
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MFU in %")
    return "Model FLOPs utilisation in percent; attention counted by the pairs its mask allows."


def _fill(axes: Any, stages: Sequence[StageProgress]) -> str | None:
    both = {"tokens": lambda m: 100 * m["fill"], "crops": lambda m: 100 * m["crop_fill"] if "crop_fill" in m else None}
    _lines(axes, stages, both)
    axes.set_ylim(0, 103)
    axes.set_ylabel("fill in %")
    return "Fill of the packs in percent of their two budgets."


def _times(axes: Any, stages: Sequence[StageProgress]) -> str | None:
    _lines(axes, stages, {"step": lambda m: m["seconds"], "waiting for data": lambda m: m.get("wait")})
    axes.set_ylim(bottom=0)
    axes.set_ylabel("seconds")
    return "Seconds per step, and the part of them spent waiting for data."


CHARTS = (_loss, _scores, _tasks, _norms, _learning_rates, _speed, _mfu, _fill, _times)


def _stage_marks(axes: Any, stages: Sequence[StageProgress]) -> None:
    if len(stages) < 2:
        return
    before = offsets(stages)
    for stage in stages:
        start = before[stage.name]
        if start:
            axes.axvline(start, color="0.75", linewidth=0.8, zorder=0)
        middle = start + stage.step / 2
        axes.text(middle, 1.01, stage.name, transform=axes.get_xaxis_transform(), ha="center", color="#5b6875")
