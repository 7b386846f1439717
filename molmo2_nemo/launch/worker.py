"""One training process: `python -m molmo2_nemo.launch.worker CONFIG`. Trains, or reports why it could not."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

# Ctrl-C during the imports, which take a while: no traceback of one of them.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from molmo2_nemo.errors import INTERRUPTED, PREEMPTED, USER_ERROR, Preempted, file_error, show_error, user_message
from molmo2_nemo.launch import out_of_memory
from molmo2_nemo.launch.reports import (
    ATTEMPT_DIR,
    ERROR_DIR,
    Report,
    conclude,
    report_finished,
    report_preempted,
)
from molmo2_nemo.processes import PARENT, die_with_parent, quiet, this_rank
from molmo2_nemo.rundir.attempt import note_error
from molmo2_nemo.rundir.config_file import use_kept_templates
from molmo2_nemo.rundir.paths import stage_dir
from molmo2_nemo.rundir.verdicts import Ending
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import load_yaml
from molmo2_nemo.training import signals, watchdog


def run(cfg: RunConfig) -> int:
    """Trains; returns the process's exit code. On failure a report lies in the folder that ERROR_DIR names."""
    try:
        quiet()
        reporting = watchdog.reporting(partial(_report_hang, cfg))
        with signals.watched(), reporting:  # before the imports, which take seconds
            from molmo2_nemo.nemo.train import train

            use_kept_templates(cfg.data.text, Path(cfg.output_dir))
            train(cfg)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Preempted as stop:
        report_preempted(str(stop))
        return PREEMPTED
    except Exception as error:  # noqa: BLE001 - whatever it is, the launcher must be able to say
        return _report(cfg, error)
    return 0


def _report(cfg: RunConfig, error: Exception) -> int:
    """Reports a failure to the stage's errors.jsonl and to the launcher, or where there is none to stderr."""
    training = sys.modules.get("molmo2_nemo.training.memory_history")  # it needs torch, which may be what failed
    snapshot = training.history.ran_out if training is not None else None
    message = out_of_memory.advice(error, cfg, this_rank(), snapshot)
    user_error = message is not None
    if message is None:
        message, user_error = explained(error)
    report = Report.of(error, message, user_error=user_error)
    note_error(stage_dir(cfg), asdict(report))
    folder = os.environ.get(ERROR_DIR)
    if folder and _written(report, Path(folder)):
        pass
    elif user_error:
        show_error(message)
    else:
        print(report.traceback, file=sys.stderr)
    return USER_ERROR if user_error else 1


def _written(report: Report, folder: Path) -> bool:
    """Whether the launcher will find the report: its folder's disk may be full, too."""
    try:
        report.write(folder)
    except OSError as error:
        show_error(f"why this process failed cannot be written down: {file_error(error)}")
        return False
    return True


def _report_hang(cfg: RunConfig, message: str, stacks: str) -> None:
    """The same for a run that hangs: called by a thread, which then ends the process."""
    report = Report(this_rank(), time.time(), message, stacks, user_error=False)
    note_error(stage_dir(cfg), asdict(report) | {"cause": True})
    folder = os.environ.get(ERROR_DIR)
    written = folder is not None and _written(report, Path(folder))
    if folder and ATTEMPT_DIR in os.environ:
        conclude(Path(folder), Ending.FAILED, message, 1)
    elif not written or PARENT not in os.environ:  # a launcher of ours would say it
        show_error(message)


def explained(error: Exception) -> tuple[str, bool]:
    """One line for an error, and whether the user can fix it.

    Of the system's errors only missing and forbidden files are: others, such as lost connections and file systems that
    do not answer, may be over when a job tries again.
    """
    retried = isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, PermissionError))
    message = None if retried else user_message(error)
    if message is not None:
        return message, True
    return f"{type(error).__name__}: {error}" if str(error) else repr(error), False


def main(config: str) -> NoReturn:
    die_with_parent()
    cfg = load_yaml(config)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run(cfg)
    if code == 0:
        report_finished()
        atexit._run_exitfuncs()  # what libraries do at exit, such as Weights & Biases' last upload
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends this process at once: other ranks may sit in a collective with it, and it would wait for them at exit; and
    Python would spend seconds on taking 8,000 modules apart."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
