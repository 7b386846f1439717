"""Accuracy by depth and length of the haystack: as numbers, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.files import atomic

Line = Mapping[str, Any]  # an answered question, with the tags of tasks/needle.py
HeatMap = dict[str, Any]


def heat_map(lines: Iterable[Line], needle: str, scorer: str = "exact_match") -> HeatMap:
    """The mean score of each depth and length, as JSON values.

    Args:
        lines: answered and scored, of one or more lengths; those without the tags are left out.
        needle: picture or text.

    Returns:
        needle; depths, ascending; frames, ascending; accuracy [depth][length], 0 to 1, None where nothing was asked;
        answers [depth][length], how many that is the mean of.
    """
    cells: dict[tuple[float, int], list[float]] = {}
    for line in lines:
        tags = line["tags"]
        if tags.get("needle") == needle and scorer in line["scores"]:
            cells.setdefault((float(tags["depth"]), int(tags["frames"])), []).append(line["scores"][scorer]["value"])
    depths, frames = sorted({depth for depth, _ in cells}), sorted({length for _, length in cells})
    values = [[cells.get((depth, length), []) for length in frames] for depth in depths]
    return {
        "needle": needle,
        "depths": depths,
        "frames": frames,
        "accuracy": [[sum(v) / len(v) if v else None for v in row] for row in values],
        "answers": [[len(v) for v in row] for row in values],
    }


def by_length(found: HeatMap) -> dict[int, float]:
    """The accuracy of each length over all depths, 0 to 1."""
    means = {}
    for column, length in enumerate(found["frames"]):
        pairs = [(row[column], n[column]) for row, n in zip(found["accuracy"], found["answers"], strict=True)]
        means[length] = sum(value * n for value, n in pairs if n) / max(sum(n for _, n in pairs), 1)
    return means


def draw(maps: Sequence[HeatMap], path: Path, *, title: str, trained: int | None = None) -> Path:
    """Draws the maps side by side into the image file `path`, and returns it.

    Args:
        trained: frames of the longest haystack in training; a line stands behind it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(maps), figsize=(4.6 * len(maps), 4.2), dpi=100, squeeze=False)
    for found, place in zip(maps, axes[0], strict=True):
        values = [[float("nan") if v is None else 100 * v for v in row] for row in found["accuracy"]]
        image = place.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                if value == value:
                    place.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8)
        place.set_xticks(range(len(found["frames"])), [f"{n:,}" for n in found["frames"]])
        place.set_yticks(range(len(found["depths"])), [f"{100 * depth:.0f} %" for depth in found["depths"]])
        place.set_xlabel("frames of the haystack")
        place.set_ylabel("depth of the needle")
        place.set_title(found["needle"])
        beyond = sum(n <= trained for n in found["frames"]) if trained else 0
        if 0 < beyond < len(found["frames"]):
            place.axvline(beyond - 0.5, color="black", linestyle="--")
    figure.suptitle(title, fontsize=10, wrap=True)
    figure.colorbar(image, ax=axes[0].tolist(), label="correct, %")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix("."))
    plt.close(figure)
    return path
