"""What happens round a step: seeds, metrics, progress."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from molmo2_nemo.nemo.optimizer import GROUPS, GroupClippingOptimizer, name_of_group


class SeedEachStep(pl.Callback):
    """Random states as a function of (seed, step, rank), so that resuming needs none of them in the checkpoint.

    Ranks of one tensor-parallel group share the default generator (replicated activations need equal dropout) and get
    different ones for their sequence shards, as Megatron has it; data, context and pipeline ranks all differ.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        place = (
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        digest = hashlib.sha256(repr((self.seed, trainer.global_step, place)).encode()).digest()
        seed = int.from_bytes(digest[:4], "little") >> 1
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also queues a call for devices that are not there
        model_parallel_cuda_manual_seed(seed)


class Metrics(pl.Callback):
    """One JSON line and one set of TensorBoard scalars per optimizer step, and progress a person can follow.

    Args:
        folder: the run's folder; the lines go to metrics.jsonl, steps a resumed run will repeat are dropped from it.
        stage: name shown with the progress.
        log_every: steps between plain lines when there is no terminal.
    """

    def __init__(self, folder: str, stage: str, log_every: int = 1) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.stage, self.log_every = stage, log_every
        self.data: dict[str, dict[str, int]] = {}  # at the end: records skipped per cause, and what else was counted
        self._bar: Any = None
        self._clock = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            kept = [m for m in read_metrics(self.path) if m["step"] <= trainer.global_step]
            _write_lines(self.path, kept)
            if sys.stdout.isatty():
                self._bar = _progress_bar(self.stage, trainer.max_steps, trainer.global_step)
        self._clock = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen = [pl_module.tokens_seen, pl_module.slots_seen, pl_module.crops_seen]
        skipped = getattr(getattr(trainer, "datamodule", None), "skipped", 0)
        counts = torch.tensor([*seen, skipped], dtype=torch.int64).to(pl_module.device)
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        tokens, slots, crops, skipped = counts.tolist()
        pl_module.tokens_seen = pl_module.slots_seen = pl_module.crops_seen = 0
        loss = float(trainer.callback_metrics["reduced_train_loss"])
        if trainer.is_global_zero and not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {trainer.global_step} is {loss}; training cannot go on")
        if not trainer.is_global_zero:
            return
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        optimizer = trainer.optimizers[0]
        clipping: GroupClippingOptimizer = optimizer.mcore_optimizer  # type: ignore[attr-defined]
        line: dict[str, Any] = {"step": trainer.global_step, "loss": loss}
        line |= {f"grad_norm_{g}": clipping.group_norms.get(g, 0.0) for g in GROUPS}
        line |= {f"lr_{name_of_group(g)}": g["last_lr"] for g in optimizer.param_groups if "last_lr" in g}
        line |= {
            "tokens": tokens,
            "slots": slots,
            "crops": crops,
            "fill": tokens / slots,
            "skipped": skipped,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
        self._record(trainer, line)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["last_lr"] = group["lr"]  # the rate of this update; the schedule moves on before the step ends

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
        with self.path.open("a") as f:
            f.write(json.dumps(line) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in line.items() if k != "step"}, step=line["step"])
        text = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s  fill {line['fill']:.0%}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=line["step"], text=text)
        elif line["step"] % self.log_every == 0 or line["step"] == trainer.max_steps:
            print(f"{self.stage} step {line['step']}/{trainer.max_steps}  {text}", flush=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(path)


def _progress_bar(stage: str, total: int, done: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"{stage:>8}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    bar = Progress(*columns, TimeRemainingColumn())
    bar.start()
    bar.add_task(stage, total=total, completed=done, text="")
    return bar
