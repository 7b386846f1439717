"""Steps whose loss or gradient would spoil the model: seen before the update, skipped, counted, and when to give up.

All ranks judge the same numbers, so all skip or none. A skipped step counts as a step: the schedule and the data move
on, weights and moments stay.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from molmo2_nemo.errors import UserError
from molmo2_nemo.rundir.lines import append_line, cut_lines
from molmo2_nemo.rundir.paths import FAULTS
from molmo2_nemo.settings.run import BESIDE_ADAPTERS, OPTIMIZER_GROUPS, FaultConfig
from molmo2_nemo.training.groups import trained_groups
from molmo2_nemo.training.step_result import StepResult
from molmo2_nemo.training.whereabouts import Work, here


class FaultGuard:
    """Judges every step by its loss and gradient norms.

    Args:
        config: what counts as a fault, and how many are too many.
    """

    def __init__(self, config: FaultConfig) -> None:
        self.config = config
        self.in_a_row = self.total = 0
        self.reason: str | None = None  # why the last step was skipped; None if it was taken
        self.taken: deque[list[float]] = deque(maxlen=config.spike_window)  # figures of steps that were taken

    def skips(self, loss: float | None, norms: Sequence[float]) -> bool:
        """Whether the step must not be taken. A collective of all ranks, called once a step.

        Args:
            loss: of the global batch; None on ranks that do not know it (pipeline stages before the last).
            norms: gradient norm of each group, as `trained_groups` has them.
        """
        figures = agreed([-math.inf if loss is None else loss, *norms])
        self.reason = self._fault(figures)
        if self.reason is None:
            self.in_a_row = 0
            self.taken.append(figures)
        else:
            self.in_a_row += 1
            self.total += 1
        return self.reason is not None

    def judge(self, result: StepResult, norms: dict[str, float], rates: dict[str, float]) -> bool:
        """Write what the optimizer found into the step's result; whether the step must not be taken. A collective of
        all ranks, called once a step.

        Args:
            norms, rates: gradient norm before clipping and learning rate of every group that trains.
        """
        here.at(Work.UPDATING)
        result.gradient_norms, result.learning_rates = norms, rates
        loss = None if result.loss is None else float(result.loss)
        skips = self.skips(loss, [norms.get(group, 0.0) for group in trained_groups(norms)])
        result.fault, result.skipped_steps = self.reason, self.total
        return skips

    def check(self, step: int) -> None:
        """Called after the step has been recorded.

        Raises:
            UserError: too many steps were skipped. Another attempt would meet the same packs and fail in the same way.
        """
        config = self.config
        if self.in_a_row > config.max_in_a_row or self.total > config.max_total:
            raise UserError(
                f"step {step}: {self.reason}. {self.in_a_row} steps in a row were skipped, {self.total} in all "
                f"(faults.max_in_a_row={config.max_in_a_row}, faults.max_total={config.max_total}). The same command "
                "would meet the same packs again. To pass over them, resume with a higher faults.max_in_a_row or "
                "faults.max_total. For lower learning rates (stage.optim.vit.lr, connector.lr, llm.lr), or without the "
                "records that faults.jsonl names, begin in another output_dir with init_from=<the last checkpoint>"
            )

    def state(self) -> str:
        """The guard's counts and figures as text, for the checkpoint."""
        return json.dumps({"in_a_row": self.in_a_row, "total": self.total, "taken": list(self.taken)})

    def load(self, state: str) -> None:
        values = json.loads(state)
        self.in_a_row, self.total = values["in_a_row"], values["total"]
        self.taken.extend(values["taken"])

    def _fault(self, figures: list[float]) -> str | None:
        groups = (*OPTIMIZER_GROUPS, BESIDE_ADAPTERS)[: len(figures) - 1]
        names = ("loss", *(f"gradient norm of {group}" for group in groups))
        for name, value in zip(names, figures, strict=True):
            if math.isnan(value) or value == math.inf:
                return f"{name} is not finite"
        sigma = self.config.spike_sigma
        if sigma is None or len(self.taken) < max(2, self.config.spike_window // 2):
            return None
        for index, (name, value) in enumerate(zip(names, figures, strict=True)):
            before = [row[index] for row in self.taken]
            mean, deviation = statistics.fmean(before), statistics.stdev(before)
            if deviation > 0 and value > mean + sigma * deviation:
                return f"{name} {value:.4g} is {(value - mean) / deviation:.1f} deviations above its mean {mean:.4g}"
        return None


class SkippedSteps:
    """The list of skipped steps in faults.jsonl. Lines of steps that a resumed run will repeat are dropped.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / FAULTS

    def start(self, step: int) -> None:
        """Training goes on after `step`."""
        if dist.get_rank() == 0:
            cut_lines(self.path, step)

    def record(self, step: int, fault: str, result: StepResult) -> None:
        """Write down a step that was skipped, with the records that were in it. A collective of all ranks."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, result.statistics.keys)
        if dist.get_rank() == 0:
            records = [key for part in gathered for key in part]
            append_line(self.path, {"step": step, "time": time.time(), "fault": fault, "records": records})


def refuse_infinite(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse to start with weights that are not finite, which would make every step a fault.

    Args:
        parameters: names and values, on this rank.

    Raises:
        UserError: names the first such parameter.
    """
    for name, parameter in parameters:
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"{name} is not finite in the weights this run starts from, or the checkpoint did not bring it; take "
                "another init_from"
            )


def agreed(figures: list[float]) -> list[float]:
    """The largest of each figure over all ranks; NaN where it is NaN on any. A collective of all ranks."""
    bad = [math.isnan(x) for x in figures]
    clean = [0.0 if b else x for x, b in zip(figures, bad, strict=True)]  # backends differ on the largest of NaN and x
    both = torch.tensor([*clean, *map(float, bad)], dtype=torch.float64).to(torch.cuda.current_device())
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    values = both.tolist()
    return [math.nan if flag else x for x, flag in zip(values[: len(bad)], values[len(bad) :], strict=True)]
