"""The log of a run: one JSON line and one set of scalars per optimizer step, and progress a person can follow."""

from __future__ import annotations

import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from molmo2_nemo.nemo.module import is_first_of_replica
from molmo2_nemo.rundir.lines import append_line, cut_lines
from molmo2_nemo.settings.run import OPTIMIZER_GROUPS

# Dense bf16 TFLOP/s of one device, from the makers' data sheets; the first name found in torch's is taken.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("A10", 125.0),
)


class Metrics(pl.Callback):
    """Writes metrics.jsonl and feeds the loggers.

    Args:
        folder: the run's folder; steps that a resumed run will repeat are dropped from metrics.jsonl.
        stage: name shown with the progress.
        log_every: steps between plain lines when there is no terminal.
        crop_budget: crops a pack may hold.
        peak_tflops: of one device; None asks the table above.
    """

    def __init__(
        self, folder: str, stage: str, log_every: int = 1, *, crop_budget: int, peak_tflops: float | None = None
    ) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.stage, self.log_every, self.crop_budget = stage, log_every, crop_budget
        self.peak = peak_tflops if peak_tflops is not None else known_peak()
        self.data: dict[str, dict[str, int]] = {}  # at the end: records skipped per cause, and what else was counted
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
        result = pl_module.step_result
        counts = result.statistics
        skipped = getattr(getattr(trainer, "datamodule", None), "skipped", 0)
        own = [counts.tokens, counts.padded_tokens, counts.crops, counts.packs, counts.flops]
        own.append(skipped if is_first_of_replica() else 0)
        tokens, padded_tokens, crops, packs, flops, skipped = _reduced(own, dist.ReduceOp.SUM)
        # known on the last pipeline stage, alike on all its ranks
        task_sums = result.task_sums or [0.0] * (2 * len(pl_module.tasks))
        wait, memory, *task_sums = _reduced([counts.wait, memory_gib(), *task_sums], dist.ReduceOp.MAX)
        seconds = time.perf_counter() - self._clock
        if not trainer.is_global_zero:
            return
        line: dict[str, Any] = {
            "step": trainer.global_step,
            "time": time.time(),
            "loss": _number(float(trainer.callback_metrics["reduced_train_loss"])),
        }
        line |= {f"grad_norm_{g}": _number(result.gradient_norms.get(g, 0.0)) for g in OPTIMIZER_GROUPS}
        line |= {f"lr_{name}": rate for name, rate in result.learning_rates.items()}
        line |= {
            "tokens": int(tokens),
            "padded_tokens": int(padded_tokens),
            "crops": int(crops),
            "fill": tokens / padded_tokens,
            "crop_fill": crops / (packs * self.crop_budget),
            "skipped": int(skipped),
            "skipped_steps": result.skipped_steps,
            "seconds": seconds,
            "wait": wait,
            "tokens_per_second": tokens / seconds,
            "tflops": flops / seconds / dist.get_world_size() / 1e12,
            "memory_gib": memory,
            "tasks": _means(pl_module.tasks, task_sums),
        }
        if self.peak:
            line["mfu"] = line["tflops"] / self.peak
        if result.fault:
            line["fault"] = result.fault
        self._record(trainer, line)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop_bar()
        data = getattr(trainer, "datamodule", None)
        if data is None or not hasattr(data, "totals"):
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

    def _record(self, trainer: pl.Trainer, line: dict[str, Any]) -> None:
        append_line(self.path, line)
        scalars = {k: v for k, v in line.items() if k not in ("step", "time") and isinstance(v, (int, float))}
        scalars |= {f"task/{name}": value for name, value in line["tasks"].items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=line["step"])
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
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_TFLOPS if known in name), None)


def memory_gib() -> float:
    """The most memory this process has held: of the device, or of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _reduced(values: list[float], how: Any) -> list[float]:
    """Sum or maximum over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64).to(torch.cuda.current_device())
    dist.all_reduce(tensor, op=how)
    return tensor.tolist()


def _means(tasks: list[str], sums: list[float]) -> dict[str, float | None]:
    """Loss of each task that the step had tokens of. sums: weighted losses of all tasks, then their weights."""
    losses, weights = sums[: len(tasks)], sums[len(tasks) :]
    means = zip(tasks, losses, weights, strict=True)
    return {task: _number(loss / weight) for task, loss, weight in means if weight > 0}


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _progress_bar(stage: str, total: int, done: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"{stage:>8}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    bar = Progress(*columns, TimeRemainingColumn())
    bar.start()
    bar.add_task(stage, total=total, completed=done, text="")
    return bar
