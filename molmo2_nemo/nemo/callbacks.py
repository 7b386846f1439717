"""What happens around a step: seeds, the count of skipped steps, stopping on a signal."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from molmo2_nemo.errors import Preempted, UserError
from molmo2_nemo.rundir.lines import append_line, cut_lines
from molmo2_nemo.rundir.paths import FAULTS
from molmo2_nemo.training import signals
from molmo2_nemo.training.faults import FaultGuard, agreed


class SeedEachStep(pl.Callback):
    """Random states as a function of (seed, step, rank), so that resuming needs none of them in the checkpoint.

    Ranks of one tensor-parallel group share the default generator (replicated activations need equal dropout) and get
    different ones for their sequence shards, as Megatron has it; data, context and pipeline ranks all differ.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rank = (
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        digest = hashlib.sha256(repr((self.seed, trainer.global_step, rank)).encode()).digest()
        seed = int.from_bytes(digest[:4], "little") >> 1
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also queues a call for devices that are not there
        model_parallel_cuda_manual_seed(seed)


class SkippedSteps(pl.Callback):
    """Keeps the fault guard's counts across a resume, writes skipped steps to faults.jsonl, stops after too many.

    As in metrics.jsonl, lines of steps that a resumed run will repeat are dropped.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / FAULTS
        self.guard: FaultGuard | None = None
        self._loaded: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Refuses to start with weights that are not finite, which would make every step a fault.

        Raises:
            UserError: names the first such parameter of this rank.
        """
        self.guard = pl_module.optim.guard
        if trainer.is_global_zero:
            cut_lines(self.path, trainer.global_step)
        if self._loaded is not None:
            self.guard.load(self._loaded)
        for name, parameter in pl_module.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise UserError(f"{name} is not finite in the weights this run starts from; take another init_from")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.guard is not None
        if self.guard.reason is None:
            return
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, pl_module.step_result.statistics.keys)
        if trainer.is_global_zero:
            records = [key for part in gathered for key in part]
            append_line(
                self.path,
                {"step": trainer.global_step, "time": time.time(), "fault": self.guard.reason, "records": records},
            )
        self.guard.check(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"guard": self.guard.state()} if self.guard is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict.get("guard")


class StopOnSignal(pl.Callback):
    """Ends training after the step in which any rank was sent SIGTERM or SIGUSR1; the last step is saved as at any end.
    signals.py has the whole story.

    `stopped` then names the signal, on every rank. Whoever keeps training waiting between two steps asks `leaves` now
    and then (validation.py).
    """

    def __init__(self) -> None:
        self.stopped: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        signals.catch()
        if self._asked()[0]:
            raise Preempted(f"{self.stopped} came before the first step; nothing was trained")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.leaves(trainer)

    def leaves(self, trainer: pl.Trainer, wish: bool = False) -> tuple[bool, bool]:
        """Whether the run is to end here, and whether any rank has the `wish`. A collective of all ranks."""
        before = self.stopped
        asked, wished = self._asked(wish)
        if asked and before is None:
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"{self.stopped}: saving step {trainer.global_step}, then leaving", flush=True)
        return asked, wished

    def _asked(self, wish: bool = False) -> tuple[bool, bool]:
        number, wished = agreed([float(signals.received() or 0), float(wish)])
        self.stopped = signals.name(int(number)) if number else None
        return number != 0, wished != 0
