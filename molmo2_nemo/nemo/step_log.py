"""The log of a run: one JSON line and one set of scalars per optimizer step, and progress on the terminal.

What is logged is in metrics/, one file per subject.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from molmo2_nemo.cost.hardware import device_called
from molmo2_nemo.nemo.data import pack_data
from molmo2_nemo.nemo.module import is_first_of_replica
from molmo2_nemo.rundir.lines import append_line, cut_lines
from molmo2_nemo.rundir.paths import METRICS
from molmo2_nemo.training import metrics
from molmo2_nemo.training.metrics.interface import FinishedStep


class StepLog(pl.Callback):
    """Writes metrics.jsonl and feeds the loggers.

    Args:
        folder: the run's folder; steps that a resumed run will repeat are dropped from metrics.jsonl.
        stage: name shown with the progress.
        log_every: steps between plain lines when there is no terminal.
        max_crops: of a pack.
        peak_tflops: of one device; None asks the table of known ones (cost/hardware.py).
    """

    def __init__(
        self, folder: str, stage: str, log_every: int = 1, *, max_crops: int, peak_tflops: float | None = None
    ) -> None:
        self.path = Path(folder) / METRICS
        self.stage, self.log_every, self.max_crops = stage, log_every, max_crops
        self.peak = peak_tflops if peak_tflops is not None else known_peak()
        self.data: dict[str, dict[str, int]] = {}  # filled at the end: records skipped per cause, and other counts
        self.metrics = metrics.found()
        self._bar: Any = None
        self._clock = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            cut_lines(self.path, trainer.global_step)
            if sys.stdout.isatty():
                self._bar = _progress_bar(self.stage, trainer.max_steps, trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._clock = time.perf_counter()  # the step fetches its data itself; saving and validating come between steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        data = pack_data(trainer)
        step = FinishedStep(
            result=pl_module.step_result,
            loss=float(trainer.callback_metrics["reduced_train_loss"]) if trainer.is_global_zero else math.nan,
            skipped_records=0 if data is None else data.skipped,
            first_of_replica=is_first_of_replica(),
            tasks=pl_module.tasks,
            max_crops=self.max_crops,
            peak_tflops=self.peak,
            processes=dist.get_world_size(),
        )
        summed = reduced([metric.summed(step) for metric in self.metrics], dist.ReduceOp.SUM)
        largest = reduced([metric.largest(step) for metric in self.metrics], dist.ReduceOp.MAX)
        step = dataclasses.replace(step, seconds=time.perf_counter() - self._clock)
        if not trainer.is_global_zero:
            return
        line: dict[str, Any] = {"step": trainer.global_step, "time": time.time()}
        scalars: dict[str, float] = {}
        for metric, own_sum, own_largest in zip(self.metrics, summed, largest, strict=True):
            figures = metric.figures(step, own_sum, own_largest)
            line |= figures
            scalars |= metric.scalars(figures)
        append_line(self.path, line)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=line["step"])
        self._show(trainer, line)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop_bar()
        data = pack_data(trainer)
        if data is None:
            return
        self.data = data.totals()
        if trainer.is_global_zero and (skipped := self.data["skipped"]):
            causes = ", ".join(f"{cause}: {count}" for cause, count in skipped.items())
            where = f"; they are listed in {data.config.quarantine}" if data.config.quarantine else ""
            print(f"{self.stage}: {sum(skipped.values())} records skipped ({causes}){where}", flush=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop_bar()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, trainer: pl.Trainer, line: dict[str, Any]) -> None:
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"loss {loss}  {line['tokens_per_second']:,.0f} tokens/s  fill {line['fill']:.0%}"
        if "mfu" in line:
            text += f"  MFU {line['mfu']:.0%}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=line["step"], text=text)
        elif line["step"] % self.log_every == 0 or line["step"] == trainer.max_steps:
            print(f"{self.stage} step {line['step']}/{trainer.max_steps}  {text}", flush=True)
        if "fault" in line:
            print(f"{self.stage} step {line['step']} was skipped: {line['fault']}", flush=True)


def known_peak() -> float | None:
    """Dense bf16 TFLOP/s of this device; None where it is not known, as on CPU."""
    device = device_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if device is None else device.tflops


def reduced(values: list[list[float]], how: Any) -> list[list[float]]:
    """Sum or maximum over all ranks of every value, in the lists they came in. A collective of all ranks."""
    tensor = torch.tensor([x for part in values for x in part], dtype=torch.float64).to(torch.cuda.current_device())
    dist.all_reduce(tensor, op=how)
    return [part.tolist() for part in tensor.split([len(part) for part in values])]


def _progress_bar(stage: str, total: int, done: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"{stage:>8}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    bar = Progress(*columns, TimeRemainingColumn())
    bar.start()
    bar.add_task(stage, total=total, completed=done, text="")
    return bar
