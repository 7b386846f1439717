"""A verb that works on several ranks: its processes are started here, or exist already in a torchrun or Slurm job."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from molmo2_nemo.errors import INTERRUPTED, USER_ERROR, UserError, user_message
from molmo2_nemo.launch.local import ELASTIC, run_child
from molmo2_nemo.launch.reports import ERROR_DIR, Report, explain_exit
from molmo2_nemo.launch.worker import explained, leave
from molmo2_nemo.processes import as_parent, stopped_by_signals, this_rank
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.ranges import out_of_range
from molmo2_nemo.settings.run import ParallelConfig


def is_rank() -> bool:
    """Whether something has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def layout_of(overrides: Sequence[str]) -> ParallelConfig:
    """The layout that settings such as `parallel.tensor=2` name. In a job, `data` is what is left of its processes.

    Raises:
        UserError: another setting, one that is not known, or a layout that cannot answer.
    """
    for setting in overrides:
        if setting.lstrip("+").split("=")[0].split(".")[0] != "parallel":
            raise UserError(
                f"{setting}: a checkpoint brings its own settings; here only the layout can be set (parallel.*)"
            )
    chosen = any(setting.startswith("parallel=") for setting in overrides)
    cfg = compose([*overrides, *([] if chosen else ["parallel=single"])])
    layout = cfg.parallel
    for problem in out_of_range(cfg):
        raise UserError(problem)
    if layout.pipeline > 1:
        raise UserError(
            "parallel.pipeline: pipeline stages cannot generate answers; a checkpoint can be loaded under any layout: "
            "take parallel.tensor and parallel.context"
        )
    if layout.dynamic_context:
        raise UserError("parallel.dynamic_context is for training; answers take a fixed parallel.context")
    if layout.sequence and layout.tensor == 1:
        raise UserError("parallel.sequence needs parallel.tensor above 1")
    if is_rank():
        world = int(os.environ["WORLD_SIZE"])
        if world % layout.model_size:
            raise UserError(f"{world} processes cannot hold replicas of {layout.model_size} (tensor x context)")
        replicas = world // layout.model_size
        if replicas != layout.data and any(setting.startswith("parallel.data=") for setting in overrides):
            raise UserError(
                f"parallel.data={layout.data}: the {world} processes that are there hold {replicas} replicas of "
                f"{layout.model_size} (tensor x context); leave it out, or start {layout.data * layout.model_size}"
            )
        layout.data = replicas
    return layout


def run_ranks(count: int, arguments: Sequence[str]) -> int:
    """Runs `molmo2 ARGUMENTS` in `count` processes to its end and returns the exit code; shows why one failed."""
    with tempfile.TemporaryDirectory(prefix="molmo2-") as errors:
        env = {**os.environ, **as_parent(), ERROR_DIR: errors}
        env.setdefault("OMP_NUM_THREADS", "1")
        code = run_child([sys.executable, "-m", ELASTIC, str(count), "molmo2_nemo.cli.main", *arguments], env)
        if code not in (0, INTERRUPTED):
            code = explain_exit(Path(errors), code)
    return code


def in_rank(work: Callable[[], int]) -> int:
    """Does the work of this process, which a signal interrupts as Ctrl-C does. Of several ranks only the first one is
    heard; where one fails, the launcher is told why, and the process ends at once: the others may wait for it."""
    with stopped_by_signals():
        return _done(work)


def _done(work: Callable[[], int]) -> int:
    if not is_rank():
        return work()
    folder, heard = os.environ.get(ERROR_DIR), this_rank() == 0
    try:
        with open(os.devnull, "w") as nowhere:
            with redirect_stdout(sys.stdout if heard else nowhere), redirect_stderr(sys.stderr if heard else nowhere):
                return work()
    except KeyboardInterrupt:
        if heard:  # Ctrl-C reaches every process: one says so
            raise
        return INTERRUPTED
    except Exception as error:
        if folder is None:  # started by another launcher, which shows what each process says
            raise
        message, mine = explained(error)
        Report.of(error, message, user_error=mine).write(Path(folder))
        leave(USER_ERROR if user_message(error) is not None else 1)
