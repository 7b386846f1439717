"""What happens around a step, as Lightning's callbacks: seeds, the list of skipped steps, stopping on a signal, a
profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.phases import rope_factor_at
from molmo2_nemo.model.config import preset, with_rope_factor
from molmo2_nemo.rundir.paths import PROFILE
from molmo2_nemo.settings.run import ModelSelection
from molmo2_nemo.training import faults
from molmo2_nemo.training.profile import StepProfiler
from molmo2_nemo.training.seeds import seed_step
from molmo2_nemo.training.stopping import StopTogether


class SeedEachStep(pl.Callback):
    """Sets random states when a step begins (training/seeds.py)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        seed_step(self.seed, trainer.global_step)


class RotaryOfPhase(pl.Callback):
    """Gives the model the rotary factor of each phase of `data.progression` (model/rotary.py). What is scored between
    two steps sees the one of the step before."""

    def __init__(self, model: ModelSelection, data: DataConfig) -> None:
        self.model, self.data = model, data

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._use(pl_module, max(0, trainer.global_step - 1))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._use(pl_module, trainer.global_step)

    def _use(self, module: Any, step: int) -> None:
        text = module.model_config.text
        factor = rope_factor_at(self.data, step)
        if factor is not None:
            text = with_rope_factor(text, preset(self.model.preset).text, self.model.rope_scaling, factor)
        module.rotary.use(text)


class SkippedSteps(pl.Callback):
    """Keeps the fault guard's counts across a resume, writes skipped steps to faults.jsonl, stops after too many
    (training/faults.py)."""

    def __init__(self, folder: str) -> None:
        self.skipped = faults.SkippedSteps(folder)
        self.guard: faults.FaultGuard | None = None
        self._loaded: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.guard = pl_module.optim.guard
        self.skipped.start(trainer.global_step)
        if self._loaded is not None:
            self.guard.load(self._loaded)
        faults.refuse_infinite(pl_module.named_parameters())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.guard is not None
        if self.guard.reason is not None:
            self.skipped.record(trainer.global_step, self.guard.reason, pl_module.step_result)
            self.guard.check(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"guard": self.guard.state()} if self.guard is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict.get("guard")


class StopOnSignal(pl.Callback):
    """Ends training after the step in which any rank was sent SIGTERM or SIGUSR1; the last step is saved as at any end
    (training/stopping.py)."""

    def __init__(self) -> None:
        self.together = StopTogether()

    @property
    def stopped(self) -> str | None:
        """The signal's name, on every rank; None while there was none."""
        return self.together.stopped

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.together.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.leaves(trainer)

    def leaves(self, trainer: pl.Trainer, wish: bool = False) -> tuple[bool, bool]:
        """`StopTogether.leaves` after the trainer's step; tells the trainer."""
        ends, wished = self.together.leaves(trainer.global_step, wish)
        if ends:
            trainer.should_stop = True
        return ends, wished


class ProfileBegins(pl.Callback):
    """Profiles a few steps on some ranks (training/profile.py). Before the log's callback, so that what starting costs
    is in no step's time; `ProfileEnds` is behind it, for what ending and writing cost.

    Args:
        steps: the first and the last.
        ranks: that write a trace.
    """

    def __init__(self, folder: str, stage: str, steps: list[int], ranks: list[int]) -> None:
        self.folder, self.stage, self.steps, self.ranks = folder, stage, steps, ranks
        self.profiler: StepProfiler | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        first, last = self.steps
        if trainer.global_rank in self.ranks:
            folder = Path(self.folder, PROFILE)
            self.profiler = StepProfiler(folder, first, last, trainer.global_rank, self.stage)
        if trainer.global_step >= last and trainer.is_global_zero:
            print(f"log.profile={self.steps}: these steps are done, nothing is profiled", flush=True)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.profiler is not None:
            self.profiler.begin(trainer.global_step + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """A run that was stopped in between has the steps before that."""
        if self.profiler is not None:
            show(self.profiler.close())

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self.profiler is not None:
            show(self.profiler.close())


class ProfileEnds(pl.Callback):
    """The other end of `ProfileBegins`."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        begins = next(callback for callback in trainer.callbacks if isinstance(callback, ProfileBegins))
        if begins.profiler is not None:
            show(begins.profiler.end(trainer.global_step))


def show(text: str | None) -> None:
    """Print what there is to print."""
    if text is not None:
        print(text, flush=True)
