"""Loss on held-out data as a callback of Lightning; training/validation.py finds it."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.errors import Preempted
from molmo2_nemo.nemo.callbacks import StopOnSignal
from molmo2_nemo.settings.run import ValidationConfig
from molmo2_nemo.training.validation import HeldOut


class Validation(pl.Callback):
    """Scores held-out data sets where `HeldOut` says that it is due.

    Args:
        config, data, folder, stage: see `HeldOut`.
    """

    def __init__(self, config: ValidationConfig, data: DataConfig, folder: str, stage: str) -> None:
        self.held_out = HeldOut(config, data, folder, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Score what is still to be scored at the step that a run resumes from.

        Raises:
            Preempted: a signal came meanwhile.
        """
        if self.held_out.start(trainer.global_step, trainer.max_steps):
            self.validate(trainer)
            if trainer.should_stop:
                raise Preempted(f"a signal came before the first step; step {trainer.global_step} is saved as before")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.held_out.due(trainer.global_step, trainer.max_steps) and not trainer.should_stop:
            self.validate(trainer)

    def validate(self, trainer: pl.Trainer) -> None:
        stop = next(c for c in trainer.callbacks if isinstance(c, StopOnSignal))  # type: ignore[attr-defined]
        chunks = list(trainer.strategy.megatron_parallel)  # type: ignore[attr-defined]
        losses = self.held_out.score(trainer.global_step, chunks, partial(stop.leaves, trainer))
        if losses:
            for logger in trainer.loggers:
                logger.log_metrics(losses, step=trainer.global_step)
