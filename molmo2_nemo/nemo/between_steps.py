"""Work between two steps that leaves no trace in training, as a callback of Lightning: validation, evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.loops.fit_loop import _FitLoop

from molmo2_nemo.errors import Preempted
from molmo2_nemo.nemo.callbacks import RotaryOfPhase, StopOnSignal
from molmo2_nemo.nemo.checkpoints import StageCheckpoints
from molmo2_nemo.training.between_steps import Leaves


class Work(Protocol):
    """What is done, and when."""

    def start(self, step: int, last_step: int) -> bool:
        """Called before the first step; whether there is something still to be done at it."""
        ...

    def due(self, step: int, last_step: int) -> bool:
        """Whether there is something to be done after this step."""
        ...

    def score(self, step: int, chunks: list[Any], leaves: Leaves) -> dict[str, float]:
        """Do it, unless a signal ends the run meanwhile; the figures for loggers, on rank 0."""
        ...


class BetweenSteps(pl.Callback):
    """Does work where it says that it is due, after the checkpoint of that step."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(trainer.fit_loop, _AlsoAfterTheLast):
            trainer.fit_loop = _AlsoAfterTheLast.of(trainer.fit_loop)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Do what is still to be done at the step that a run resumes from.

        Raises:
            Preempted: a signal came meanwhile.
        """
        if self.work.start(trainer.global_step, trainer.max_steps):
            self.score(trainer)
            if trainer.should_stop:
                raise Preempted(f"a signal came before the first step; step {trainer.global_step} is saved as before")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.work.due(trainer.global_step, trainer.max_steps) and not trainer.should_stop:
            checkpoints = trainer.checkpoint_callback
            assert isinstance(checkpoints, StageCheckpoints)
            checkpoints.save_due(trainer)  # Lightning would do so afterwards, and a run that is killed lose the steps
            self.score(trainer)

    def score(self, trainer: pl.Trainer) -> None:
        stop = next(c for c in trainer.callbacks if isinstance(c, StopOnSignal))  # type: ignore[attr-defined]
        chunks = list(trainer.strategy.megatron_parallel)  # type: ignore[attr-defined]
        figures = self.work.score(trainer.global_step, chunks, partial(stop.leaves, trainer))
        if figures:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)


class _AlsoAfterTheLast(_FitLoop):
    """Lightning calls no callback where all steps are done; here, what is left to do at the last is done."""

    @classmethod
    def of(cls, loop: _FitLoop) -> _AlsoAfterTheLast:
        """The loop with all that its trainer has told it so far."""
        made = cls(loop.trainer)
        made.__dict__.update(loop.__dict__)
        return made

    def run(self) -> None:
        trainer = self.trainer
        if trainer.global_step >= trainer.max_steps:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RotaryOfPhase | StopOnSignal | BetweenSteps):
                    callback.on_train_start(trainer, trainer.lightning_module)
        super().run()
