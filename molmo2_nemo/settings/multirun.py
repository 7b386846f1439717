"""Sweeps on the command line, in Hydra's grammar: overrides with several values become those of several jobs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.compose import SEVERAL, group_options

MOST = 1000  # jobs; more are a slip, such as a step of 1 in range(0,100000)


@dataclass
class Sweep:
    """What `--multirun` was asked for."""

    fixed: list[str]  # overrides of all jobs
    jobs: list[list[str]]  # of each job, its value of every key that is swept


def of_one_stage(override: str) -> tuple[str | None, str]:
    """The stage that stands before a colon, None where there is none, and the override itself."""
    head, colon, rest = override.partition(":")
    return (head, rest) if colon and "=" not in head else (None, override)


def read_sweep(overrides: Sequence[str], config_dir: str | Path | None = None) -> Sweep:
    """The jobs that overrides with several values describe: all combinations, the last key changing fastest.

    Args:
        overrides: as for `compose` or a pipeline. Several values are written `key=a,b`, `key=choice(a,b)`,
            `key=range(1,10,3)` or, for a group, `key=glob(tp*)`; a key that is given twice has the latter's.

    Raises:
        UserError: no key with several values, one value twice, a folder per job asked for, or too many jobs.
    """
    values: dict[str, list[str]] = {}  # [STAGE:]key -> overrides, one for each value
    fixed: dict[str, str] = {}
    for override in overrides:
        head, rest = of_one_stage(override)
        name = override.partition("=")[0].lstrip("+~")
        found = _values(rest, config_dir)
        values.pop(name, None)
        fixed.pop(name, None)
        if found is None:
            fixed[name] = override
            continue
        if name in ("output_dir", "cluster.slurm.workdir"):
            raise UserError(f"{override}: jobs of a sweep share it: each gets a folder of its own in output_dir")
        key = rest.partition("=")[0]
        values[name] = [f"{head}:{key}={value}" if head else f"{key}={value}" for value in found]
        if len(set(values[name])) < len(values[name]):
            raise UserError(f"{override}: the same value twice; leave one out")
    if not values:
        raise UserError(
            "--multirun: no setting has several values; write such as stage.optim.llm.lr=1e-5,2e-5, or leave it out"
        )
    if (count := prod(map(len, values.values()))) > MOST:
        raise UserError(f"--multirun: {count:,} jobs are more than {MOST:,}; write fewer values")
    return Sweep(list(fixed.values()), [list(job) for job in itertools.product(*values.values())])


class _Groups:
    """What Hydra asks for the names that a glob stands for."""

    def __init__(self, config_dir: str | Path | None) -> None:
        self.config_dir = config_dir

    def get_group_options(self, group_name: str, results_filter: Any = None) -> list[str]:
        return group_options(group_name, self.config_dir)


def _values(override: str, config_dir: str | Path | None) -> list[str] | None:
    """The values of an override that sweeps, as text for another override; None where it has one.

    Raises:
        UserError: an interval, or a range or glob that stands for nothing.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not SEVERAL.search(override):
        return None
    try:
        parser = OverridesParser.create(config_loader=_Groups(config_dir))  # type: ignore[arg-type]
        (parsed,) = parser.parse_overrides([override])
    except HydraException:
        return None  # a text that is no sweep, such as a path; `compose` says what is wrong with it, if anything is
    if not parsed.is_sweep_override():
        return None
    if not parsed.is_discrete_sweep():
        raise UserError(
            f"{override}: an interval has no list of values to run; write choice(...), or range(start,stop,step)"
        )
    found = list(parsed.sweep_string_iterator())
    if not found:
        raise UserError(f"{override}: stands for no value")
    return found
