"""The order of a run's stages, as the run itself says it: every stage's settings have the list that it was one of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from molmo2_nemo.rundir.config_file import read_config
from molmo2_nemo.rundir.paths import CONFIG, SLURM
from molmo2_nemo.settings.run import RunConfig


def stage_order(run: Path, names: Iterable[str]) -> list[str]:
    """The stages of a run: those of its lists that contain one of `names`, in their order; then the other names
    as given.

    Args:
        run: the folder that the stages lie in.
        names: of stages that have a folder or a job, each once.

    Raises:
        UserError: a config.yaml is damaged.
    """
    names = list(names)
    found = [c for name in names if (c := _config(run, name)) is not None]
    order = merged([config.stages for config in found])
    return [*order, *(name for name in names if name not in order)]


def _config(run: Path, name: str) -> RunConfig | None:
    """The settings of a stage: its own, or those that its job was submitted with."""
    return read_config(run / name / CONFIG) or read_config(run / SLURM / f"{name}.yaml")


def merged(lists: Iterable[Sequence[str]]) -> list[str]:
    """One order of what stands in several lists: a later list only adds what the ones before lack, behind its
    neighbour. The longest comes first, as others are parts of it."""
    order: list[str] = []
    for names in sorted(lists, key=len, reverse=True):
        place = 0
        for name in names:
            if name not in order:
                order.insert(place, name)
            place = order.index(name) + 1
    return order
