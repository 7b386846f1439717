"""Finished stages at a glance: a table of their summaries, and a plot of their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from molmo2_nemo.files import atomic


def print_table(title: str, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Prints what stages' summary.json say, one row per stage, at most 80 columns."""
    table = Table(title=title)
    table.add_column("stage")
    table.add_column("layout")
    for column in ("steps", "first loss", "last loss", "tokens", "fill"):
        table.add_column(column, justify="right")
    for row in summaries:
        table.add_row(
            str(row["stage"]),
            str(row["layout"]),
            str(row["steps"]),
            f"{row['first_loss']:.3f}",
            f"{row['last_loss']:.3f}",
            f"{row['tokens']:,}",
            f"{row['fill']:.0%}",
        )
    console = Console()
    if console.width > 80 or not console.is_terminal:
        console = Console(width=80)
    console.print(table)


def plot_losses(title: str, stages: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Draws the loss of every step, one curve per stage, into the image file `path`, and returns it.

    Args:
        stages: name -> the lines of its metrics.jsonl; a stage without lines gets no curve.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    offset = 0
    for name, rows in stages.items():
        if not rows:
            continue
        axes.plot([offset + r["step"] for r in rows], [r["loss"] for r in rows], label=name, linewidth=1.6)
        offset += max(r["step"] for r in rows)
        axes.axvline(offset, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlabel("optimizer step, stages one after the other")
    axes.set_ylabel("loss (weighted cross entropy + z-loss)")
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix("."))
    plt.close(figure)
    return path
