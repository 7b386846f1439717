"""slurm/jobs.json of a run: the last job submitted for each stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from molmo2_nemo.errors import UserError, read_text
from molmo2_nemo.rundir.paths import JOBS


@dataclass
class Job:
    """The last job submitted for a stage."""

    id: str
    name: str
    after: str | None  # id of the job it waits for
    submitted: float  # seconds since the epoch
    log: str  # pattern of its tasks' output; %j is the id


def read_jobs(folder: Any) -> dict[str, Job]:
    """The stages' last jobs as noted in `folder`, a run's `slurm/`; empty when there are none.

    Args:
        folder: a `Path`, or what stands for one on another machine.

    Raises:
        UserError: jobs.json is damaged.
    """
    path = folder / JOBS
    if not path.is_file():
        return {}
    try:
        return {stage: Job(**values) for stage, values in json.loads(read_text(path)).items()}
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); see `squeue --me` for what runs, then remove it") from None


def jobs_text(jobs: Mapping[str, Job]) -> str:
    """The content of the file that `read_jobs` reads."""
    return json.dumps({stage: asdict(job) for stage, job in jobs.items()}, indent=1) + "\n"
