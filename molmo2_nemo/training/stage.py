"""What a stage leaves in its folder besides its steps: who is at work on it, why they left, and the summary."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo2_nemo.data.tally import Tally
from molmo2_nemo.errors import Preempted
from molmo2_nemo.files import write_json
from molmo2_nemo.processes import this_rank
from molmo2_nemo.rundir import paths
from molmo2_nemo.rundir.attempt import heartbeat, this_process
from molmo2_nemo.rundir.checkpoint_manifest import step_folder
from molmo2_nemo.rundir.code_state import code_state
from molmo2_nemo.rundir.lines import read_metrics
from molmo2_nemo.settings.layout import layout_of_run
from molmo2_nemo.settings.run import RunConfig


class Attempt:
    """One start of a stage, written down by rank 0 in attempt.json.

    Args:
        folder: the stage's.
        layout: its name.
    """

    def __init__(self, folder: Path, layout: str) -> None:
        self.path = folder / paths.ATTEMPT
        self.first = is_first_process()
        self.layout = layout
        self.values = {**this_process(), "layout": layout}
        if self.first:
            self.values["code"] = code_state()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Training goes on inside; a sign of life is left while it does."""
        if not self.first:
            yield
            return
        write_json(self.path, self.values, indent=None)
        with heartbeat(self.path):
            yield

    def left(self, signal: str, step: int) -> Preempted:
        """Write down that a signal ended it, after a checkpoint of `step`; the error to raise."""
        if self.first:
            write_json(self.path, {**self.values, "left": signal}, indent=None)
        return Preempted(f"{signal}: step {step} is saved; the same command resumes from it")


def summary_of(
    folder: Path, stage: str, layout: str, steps: int, totals: Tally, data: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The summary of a finished stage, from all its steps, including those before a resume.

    Args:
        folder: the stage's.
        totals: of its data, from `TrainingData.totals`.
        data: seed and data sets, from `TrainingData.identity`.
    """
    lines = read_metrics(folder, tokens=int, padded_tokens=int)
    tokens = sum(line["tokens"] for line in lines)
    losses = [line["loss"] for line in lines if line["loss"] is not None] or [None]
    return {
        "stage": stage,
        "layout": layout,
        "steps": steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "tokens": tokens,
        "fill": tokens / sum(line["padded_tokens"] for line in lines),
        "skipped": dict(sorted(totals.skipped().items())),
        "counts": dict(sorted(totals.counts().items())),
        "by_source": totals.summary(),
        "data": data,
        "checkpoint": f"{paths.CHECKPOINTS}/{step_folder(steps)}",  # from the folder, which may be moved
    }


def layout_name(cfg: RunConfig) -> str:
    """The name of the run's layout on the processes that the launcher started."""
    world = os.environ.get("WORLD_SIZE")
    return layout_of_run(cfg.parallel, None if world is None else int(world))


def is_first_process() -> bool:
    """Whether this is rank 0, before there are process groups."""
    return this_rank() == 0
