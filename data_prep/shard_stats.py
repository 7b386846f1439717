"""Statistics of data sets of shards: counts, sizes, estimated tokens and crops, licences; as tables and as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from molmo2_nemo.data.manifest import MANIFEST, SHARED, read_entries, read_head


@dataclass
class Stats:
    """Statistics of one data set, from its manifest."""

    name: str
    head: dict[str, Any]
    bytes: int
    images: int = 0
    videos: int = 0
    hours: float = 0.0  # of video shown
    annotations: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64 [records], estimated
    crops: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def collect(folder: Path, manifest: Path | None = None) -> Stats:
    """The statistics of a data set, from its manifest, which may lie elsewhere.

    Raises:
        ShardError: there is no manifest, or it is damaged.
    """
    manifest = manifest or folder / MANIFEST
    head = read_head(manifest)
    stats = Stats(head["name"], head, sum(shard["bytes"] for shard in head["shards"]))
    tokens: list[np.ndarray] = []
    crops: list[np.ndarray] = []
    for entries in read_entries(manifest):
        stats.images += sum(e.images or 0 for e in entries)
        stats.videos += sum(e.duration is not None for e in entries)
        stats.hours += sum(e.duration or 0.0 for e in entries) / 3600
        stats.annotations += sum(e.annotations or 0 for e in entries)
        tokens.append(np.array([e.tokens for e in entries if e.tokens is not None], np.int64))
        crops.append(np.array([e.crops for e in entries if e.crops is not None], np.int64))
    stats.tokens, stats.crops = np.concatenate(tokens), np.concatenate(crops)
    return stats


def tables(found: Sequence[Stats]) -> list[Any]:
    """Rich tables: the data sets, what their records cost, then the licences."""
    from rich.table import Table

    def table(*titles: str) -> Table:
        made = Table(box=None, padding=(0, 1, 0, 0))
        made.add_column("data set", overflow="fold")
        for title in titles:
            made.add_column(title, justify="right", no_wrap=True)
        return made

    main = table("records", "length", "MB", "images", "videos", "hours", "annot.")
    cost = table("tokens", "p95", "max", "crops", "max")
    for s in found:
        counts = (s.head["records"], s.head["length"], round(s.bytes / 1e6, 1), s.images, s.videos, round(s.hours, 2))
        main.add_row(s.name, *(f"{n:,}" for n in (*counts, s.annotations)))
        cost.add_row(s.name, *_summary(s.tokens), *_summary(s.crops)[::2])
    licences = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("licence", "data sets"):
        licences.add_column(title, overflow="fold")
    names: dict[str, list[str]] = {}
    for s in found:
        names.setdefault(s.head.get("licence", "not recorded"), []).append(s.name)
    for licence, sets in names.items():
        licences.add_row(licence, ", ".join(sets))
    shared = [f"{s.name}: {_shared(s.head[SHARED])}" for s in found if SHARED in s.head]
    how = "\ntokens and crops of a record, estimated: mean, 95th percentile, maximum"
    return [main, how, cost, *shared, "", licences]


def _shared(counts: dict[str, int]) -> str:
    return f"{counts['members']:,} media are those of earlier records: {counts['bytes'] / 1e6:,.1f} MB less"


def _summary(values: np.ndarray) -> tuple[str, str, str]:
    if not len(values):
        return "-", "-", "-"
    return f"{values.mean():,.0f}", f"{np.percentile(values, 95):,.0f}", f"{values.max():,}"


def draw(found: Sequence[Stats], path: Path) -> None:
    """Histograms of tokens and crops per record, and records per licence, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), gridspec_kw={"width_ratios": (2, 2, 1.4)})
    for axis, name in zip(axes, ("tokens", "crops"), strict=False):
        values = [getattr(s, name) for s in found]
        top = max((int(v.max()) for v in values if len(v)), default=1)
        shown = [(s.name, v) for s, v in zip(found, values, strict=True) if len(v)]
        if len(shown) > 8:  # more colours than that cannot be told apart
            shown = [(f"{len(shown)} data sets", np.concatenate([v for _, v in shown]))]
        bins = np.linspace(0, max(top, 1), 41) if name == "tokens" else np.linspace(-0.5, top + 0.5, min(top + 2, 42))
        axis.hist([v for _, v in shown], bins=bins, stacked=True, label=[label for label, _ in shown])
        axis.set_xlabel(f"estimated {name} of a record")
        axis.set_ylabel("records")
        axis.yaxis.get_major_locator().set_params(integer=True)
        if shown:
            axis.legend(fontsize=7, frameon=False)
    counts: dict[str, int] = {}
    for s in found:
        licence = s.head.get("licence", "not recorded")
        counts[licence] = counts.get(licence, 0) + s.head["records"]
    labels = [text if len(text) <= 28 else text[:27] + "…" for text in counts]
    axes[2].barh(range(len(counts)), list(counts.values()), height=0.5)
    axes[2].set_ylim(-0.7, max(len(counts), 4) - 0.3)
    axes[2].set_yticks(range(len(counts)), labels, fontsize=7)
    axes[2].set_xlabel("records")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
