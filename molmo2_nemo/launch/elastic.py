"""Several local processes through torch's elastic launcher.

    python -m molmo2_nemo.launch.elastic COUNT MODULE ARGUMENT...

Does what `torchrun --standalone` does, but prints nothing about what went wrong: the workers report why they ended
(reports.py), and torch's own summary would print the same again, once per process.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

# Ctrl-C during the imports, which take a while: no traceback of one of them.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from molmo2_nemo.errors import INTERRUPTED, PREEMPTED
from molmo2_nemo.launch.reports import ERROR_DIR, Exits
from molmo2_nemo.processes import STOP_SIGNALS, as_parent, die_with_parent

# Passed on to the workers; training/signals.py says what follows.
SIGNALS = ",".join(["SIGINT", "SIGHUP", "SIGQUIT", *(number.name for number in STOP_SIGNALS)])
GRACE = 600  # seconds that workers get to save a checkpoint and leave after one of them


def main(count: int, module: str, *arguments: str) -> int:
    """Runs `python -m MODULE ARGUMENTS` in `count` processes; returns 0, the exit code of the first that failed, or
    PREEMPTED after a signal that asks a run to leave, however the processes then ended: torch does not say."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    die_with_parent()
    known = {f.name for f in dataclasses.fields(LaunchConfig)}  # older versions of torch lack some
    leaving: dict[str, Any] = {"signals_to_handle": SIGNALS, "shutdown_timeout": GRACE}
    settings = LaunchConfig(
        **{name: value for name, value in leaving.items() if name in known},
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    os.environ |= {**as_parent(), "TORCHELASTIC_SIGNALS_TO_HANDLE": SIGNALS}
    logging.disable(logging.CRITICAL)  # reports.py says what went wrong
    try:
        elastic_launch(settings, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        failures = {str(number): f.exitcode for number, f in error.failures.items()}
        Exits(rank, failure.exitcode, failures).write(Path(os.environ[ERROR_DIR]))
        return abs(failure.exitcode) or 1
    except SignalException as stop:
        return PREEMPTED if stop.sigval in STOP_SIGNALS else INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
