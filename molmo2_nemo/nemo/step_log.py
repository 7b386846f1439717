"""The log of a run as a callback of Lightning; training/step_log.py writes it."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from molmo2_nemo.data.tally import Tally
from molmo2_nemo.nemo.data import training_data
from molmo2_nemo.training.step_log import StepWriter


class StepLog(pl.Callback):
    """Writes metrics.jsonl and feeds Lightning's loggers.

    Args:
        folder, stage, log_every, max_crops, peak_tflops, fp8, prometheus: see `StepWriter`.
    """

    def __init__(
        self,
        folder: str,
        stage: str,
        log_every: int = 1,
        *,
        max_crops: int,
        peak_tflops: float | None = None,
        fp8: bool = False,
        prometheus: str | None = None,
    ) -> None:
        self.writer = StepWriter(
            folder, stage, log_every, max_crops=max_crops, peak_tflops=peak_tflops, fp8=fp8, prometheus=prometheus
        )
        self.data: Tally | None = None  # filled at the end: what the data came to

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.writer.start(trainer.global_step, trainer.max_steps)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.writer.begin()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        data = training_data(trainer)
        scalars = self.writer.finish(
            trainer.global_step,
            pl_module.step_result,
            float(trainer.callback_metrics["reduced_train_loss"]) if trainer.is_global_zero else math.nan,
            0 if data is None else data.skipped,
            pl_module.tasks.names,
            None if data is None else data.reading,
        )
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.writer.stop()
        if (data := training_data(trainer)) is not None:
            self.data = self.writer.totals(data)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.writer.stop()
