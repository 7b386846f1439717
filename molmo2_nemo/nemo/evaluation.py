"""Tasks evaluated during training as a callback of Lightning; training/evaluating.py does it."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.errors import Preempted
from molmo2_nemo.nemo.callbacks import StopOnSignal
from molmo2_nemo.settings.run import EvaluationConfig
from molmo2_nemo.training.evaluating import Evaluating


class Evaluation(pl.Callback):
    """Evaluates tasks where `Evaluating` says that it is due.

    Args:
        config, data, folder, stage: see `Evaluating`.
    """

    def __init__(self, config: EvaluationConfig, data: DataConfig, folder: str, stage: str) -> None:
        self.evaluating = Evaluating(config, data, folder, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Evaluate what is still to be evaluated at the step that a run resumes from.

        Raises:
            Preempted: a signal came meanwhile.
        """
        if self.evaluating.start(trainer.global_step, trainer.max_steps):
            self.evaluate(trainer)
            if trainer.should_stop:
                raise Preempted(f"a signal came before the first step; step {trainer.global_step} is saved as before")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.evaluating.due(trainer.global_step, trainer.max_steps) and not trainer.should_stop:
            self.evaluate(trainer)

    def evaluate(self, trainer: pl.Trainer) -> None:
        stop = next(c for c in trainer.callbacks if isinstance(c, StopOnSignal))  # type: ignore[attr-defined]
        chunks = list(trainer.strategy.megatron_parallel)  # type: ignore[attr-defined]
        scores = self.evaluating.evaluate(trainer.global_step, chunks, partial(stop.leaves, trainer))
        if scores:
            for logger in trainer.loggers:
                logger.log_metrics(scores, step=trainer.global_step)
