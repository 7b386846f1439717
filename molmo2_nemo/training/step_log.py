"""The log of a run: one JSON line and one set of scalars per optimizer step, and progress on the terminal.

What is logged is in metrics/, one file per subject.
"""

from __future__ import annotations

import dataclasses
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from molmo2_nemo.cost.hardware import Device, device_called
from molmo2_nemo.data.tally import Tally
from molmo2_nemo.errors import plural
from molmo2_nemo.rundir.lines import append_line, cut_lines
from molmo2_nemo.rundir.paths import METRICS
from molmo2_nemo.training import metrics
from molmo2_nemo.training.data import TrainingData
from molmo2_nemo.training.metrics.interface import FinishedStep, Place
from molmo2_nemo.training.prometheus import PrometheusFile
from molmo2_nemo.training.step import is_first_of_replica
from molmo2_nemo.training.step_result import StepResult
from molmo2_nemo.training.whereabouts import Work, here

HOST = 62  # bytes of a host's name that are shown


class StepWriter:
    """Writes metrics.jsonl and shows progress; the host feeds its loggers with what `finish` returns.

    Args:
        folder: the run's folder; steps that a resumed run will repeat are dropped from metrics.jsonl.
        stage: name shown with the progress.
        log_every: steps between plain lines when there is no terminal.
        max_crops: of a pack.
        peak_tflops: of one device; None asks the table of known ones (cost/hardware.py).
        prometheus: file for Prometheus' node exporter.
        fp8: the decoder multiplies in FP8; the table's peak is then the one of that.
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
        self.path = Path(folder) / METRICS
        self.stage, self.log_every, self.max_crops = stage, log_every, max_crops
        self.peak = peak_tflops if peak_tflops is not None else known_peak(fp8)
        self.metrics = metrics.found()
        self.prometheus: PrometheusFile | None = None
        if prometheus is not None:
            self.prometheus = PrometheusFile(Path(prometheus), {"run": Path(folder).parent.name, "stage": stage})
        self.last_step = 0
        self.places: list[Place] = []
        self._bar: Any = None
        self._clock = 0.0

    def start(self, step: int, last_step: int) -> None:
        """Training goes on after `step`. A collective of all ranks."""
        self.last_step, self.places = last_step, gathered_places()
        if dist.get_rank() == 0:
            cut_lines(self.path, step)
            if step < last_step:
                print(f"{self.stage}: model and data are ready; step {step + 1:,} of {last_step:,} is next", flush=True)
            if sys.stdout.isatty():
                self._bar = _progress_bar(self.stage, last_step, step)

    def begin(self) -> None:
        """A step begins: it fetches its data itself; saving and validating come between steps."""
        self._clock = time.perf_counter()

    def finish(
        self,
        step: int,
        result: StepResult,
        loss: float,
        skipped_records: int,
        tasks: list[str],
        read: float | None = None,
    ) -> dict[str, float]:
        """Write the line of a step that has ended; what loggers get of it, on rank 0. A collective of all ranks.

        Args:
            step: its number, from 1.
            loss: of the global batch, on rank 0.
            skipped_records: that this data-parallel rank could not use, since the run began.
            tasks: what the loss is also logged for.
            read: seconds that this rank took to read a step's data, where that is done ahead for other ranks, too
                (`TrainingData.reading`).
        """
        here.at(Work.FINISHING)
        result.clock.read = read
        ended = FinishedStep(
            result=result,
            loss=loss,
            skipped_records=skipped_records,
            first_of_replica=is_first_of_replica(),
            tasks=tasks,
            max_crops=self.max_crops,
            peak_tflops=self.peak,
            processes=dist.get_world_size(),
            rank=dist.get_rank(),
            places=self.places,
        )
        summed = reduced([metric.summed(ended) for metric in self.metrics], dist.ReduceOp.SUM)
        largest = reduced([metric.largest(ended) for metric in self.metrics], dist.ReduceOp.MAX)
        ended = dataclasses.replace(ended, seconds=time.perf_counter() - self._clock)
        if dist.get_rank() != 0:
            return {}
        line: dict[str, Any] = {"step": step, "time": time.time()}
        scalars: dict[str, float] = {}
        for metric, own_sum, own_largest in zip(self.metrics, summed, largest, strict=True):
            figures = metric.figures(ended, own_sum, own_largest)
            line |= figures
            scalars |= metric.scalars(figures)
        append_line(self.path, line)
        if self.prometheus is not None:
            self.prometheus.write(line, self.last_step)
        self._show(line)
        return scalars

    def totals(self, data: TrainingData) -> Tally:
        """What the run's data came to, once training is over: see `TrainingData.totals`. Says what was skipped,
        left out and replaced."""
        here.at(Work.SAVING)
        totals = data.totals()
        if dist.get_rank() != 0:
            return totals
        if skipped := totals.skipped():
            causes = ", ".join(f"{cause}: {count}" for cause, count in sorted(skipped.items()))
            where = f"; they are listed in {data.config.quarantine}" if data.config.quarantine else ""
            print(f"{self.stage}: {plural(sum(skipped.values()), 'record')} skipped ({causes}){where}", flush=True)
        if lines := totals.table(data.config):
            print(f"{self.stage}: what was skipped, left out or replaced, by data set:", *lines, sep="\n", flush=True)
        return totals

    def stop(self) -> None:
        """Training is over, or has failed."""
        if self._bar is not None:
            self._bar.stop()

    def _show(self, line: dict[str, Any]) -> None:
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"loss {loss}  {line['tokens_per_second']:,.0f} tokens/s  fill {line['fill']:.0%}"
        if "mfu" in line:
            text += f"  MFU {line['mfu']:.0%}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=line["step"], text=text)
        elif line["step"] % self.log_every == 0 or line["step"] == self.last_step:
            print(f"{self.stage} step {line['step']}/{self.last_step}  {text}", flush=True)
        if "fault" in line:
            print(f"{self.stage} step {line['step']} was skipped: {line['fault']}", flush=True)


def known_peak(fp8: bool = False) -> float | None:
    """Dense bf16 (or FP8) TFLOP/s of this device; None where it is not known, as on CPU."""
    device = this_device()
    return None if device is None else device.fp8_tflops if fp8 else device.tflops


def this_device() -> Device | None:
    """This process's GPU in the table of known ones (cost/hardware.py); None where it is not there, as on CPU."""
    return device_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def gathered_places() -> list[Place]:
    """Where each rank runs, in their order. A collective of all ranks; names of hosts are cut at HOST bytes."""
    device = torch.cuda.current_device()
    own = torch.zeros(HOST + 2, dtype=torch.uint8)
    name = socket.gethostname().encode()[:HOST]
    own[: len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
    gpu = int(device) + 1 if torch.cuda.is_available() else 0
    own[HOST:] = torch.tensor([gpu, parallel_state.get_pipeline_model_parallel_rank()], dtype=torch.uint8)
    found = [torch.zeros_like(own).to(device) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own.to(device))
    places = []
    for row in found:
        *letters, number, stage = row.tolist()
        host = bytes(letters).rstrip(b"\0").decode(errors="replace")
        places.append(Place(host, number - 1 if number else None, stage))
    return places


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
