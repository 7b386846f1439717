"""SIGTERM and SIGUSR1 ask a run to save a checkpoint and leave. The whole story, from sender to exit code:

1. Sender. Anyone, to any process of the run. Slurm sends SIGUSR1 to every task `cluster.slurm.grace` seconds before the
   time limit, and SIGTERM at preemption and on scancel.
2. Down to the training processes. `molmo2 train` and `pipeline` pass both signals to their child (launch/local.py). If
   that is torch's elastic launcher, it passes them to every worker and gives these 600 s to leave (launch/elastic.py).
   Inside a torchrun or Slurm job the training process gets them directly. Loader workers ignore SIGTERM, because their
   trainer still needs them (data/loader.py).
3. In a training process. `watched`, in place from before the first heavy import (launch/worker.py), only notes the
   signal.
4. All ranks agree. After every step, and between two packs of a validation, `StopTogether` (stopping.py) asks all
   ranks whether any was sent one. If so, the host ends training there and the last step is saved as at any end. A
   signal that came before the first step ends the run with nothing trained.
5. Out. nemo/train.py writes the signal into attempt.json and raises `Preempted` on every rank. The worker notes that in
   the folder for reports, as elastic loses exit codes (launch/reports.py), and leaves with 75; local.py returns 75 and
   the verb says that the same command resumes. Where the signal came during the last step nobody raises it: the stage
   is finished and the code 0. A pipeline or sweep begins nothing after it (launch/pipeline.py, multirun.py).
6. In a Slurm job of ours tasks write "preempted" into `outcome` and leave with 0, since srun would kill the others for
   any other code. The job's script then has Slurm requeue the job. A script that is itself sent SIGTERM was cancelled,
   and leaves without a requeue (launch/slurm/script.py).

Ctrl-C (SIGINT) is not one of them: the run leaves at once, without a checkpoint, with 130. A terminal sends it to every
process; where only the command got it, it is passed on after some seconds.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from molmo2_nemo.processes import STOP_SIGNALS

_seen: signal.Signals | None = None


def received() -> signal.Signals | None:
    """The first of STOP_SIGNALS that this process was sent since `watched` began; None when there was none."""
    return _seen


def catch() -> None:
    """Put the handlers in place; again after a host has put its own there (Lightning does when training starts)."""
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in STOP_SIGNALS:
            signal.signal(number, _note)


@contextmanager
def watched() -> Iterator[None]:
    """STOP_SIGNALS are noted instead of ending the process, until the block is left; then handlers are as before. A
    block inside another changes nothing."""
    global _seen
    if threading.current_thread() is not threading.main_thread():
        _seen = None
        yield
        return
    if signal.getsignal(signal.SIGTERM) is _note:
        yield
        return
    _seen = None
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    catch()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: Any) -> None:
    global _seen
    if _seen is None:
        _seen = signal.Signals(number)


def name(number: int) -> str:
    """Such as "SIGTERM"."""
    return signal.Signals(number).name
