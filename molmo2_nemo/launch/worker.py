"""One training process: `python -m molmo2_nemo.launch.worker CONFIG`. Trains, or writes down why it could not."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

from molmo2_nemo.errors import INTERRUPTED, PREEMPTED, USER_ERROR, Preempted, UserError
from molmo2_nemo.files import write_json
from molmo2_nemo.launch import out_of_memory
from molmo2_nemo.launch.local import ERROR_DIR
from molmo2_nemo.processes import die_with_parent, quiet
from molmo2_nemo.rundir.stages import note_error, stage_dir
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import load_yaml


def run(cfg: RunConfig) -> int:
    """Trains; returns the process's exit code. On failure a report lies in the folder that ERROR_DIR names."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        quiet()
        from molmo2_nemo.nemo.train import train

        train(cfg)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Preempted as stop:
        if os.environ.get(ERROR_DIR):  # exit codes get lost in torch's elastic launcher
            (Path(os.environ[ERROR_DIR]) / "preempted").write_text(str(stop))
        return PREEMPTED
    except ImportError as error:
        # A missing package is the user's to install, a wrong name inside ours is not.
        missing = (error.name or "").split(".")[0] not in ("", "molmo2_nemo", "data_prep")
        text = f"{error}; `molmo2 doctor` says what is missing and how to get it"
        return _report(cfg, rank, error, text if missing else str(error), user_error=missing)
    except Exception as error:  # noqa: BLE001 - whatever it is, the launcher must be able to tell
        if (told := out_of_memory.explain(error, cfg, rank)) is not None:
            return _report(cfg, rank, error, told, user_error=True)
        return _report(cfg, rank, error, str(error) or repr(error), user_error=is_user_error(error))
    return 0


def is_user_error(error: BaseException) -> bool:
    """True for what our own code raises about the user's input: a ValueError or missing file from a frame of ours."""
    if isinstance(error, UserError):
        return True
    if not isinstance(error, (ValueError, FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, OSError):
        return True
    # A ValueError from inside a library is a fault of ours, so only a `raise` statement of this package counts.
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = str(Path(__file__).resolve().parents[1])
    return last.filename.startswith(ours) and (last.line or "").startswith("raise")


def _report(cfg: RunConfig, rank: int, error: BaseException, message: str, *, user_error: bool) -> int:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if not user_error and not isinstance(error, ValueError):
        message = f"{type(error).__name__}: {message}"
    report = {"rank": rank, "time": time.time(), "message": message, "traceback": text, "user_error": user_error}
    note_error(stage_dir(cfg), report)
    folder = os.environ.get(ERROR_DIR)
    if folder:
        write_json(Path(folder) / f"rank{rank}.json", report, indent=None)
    else:
        print(f"molmo2: error: {message}" if user_error else text, file=sys.stderr)
    return USER_ERROR if user_error else 1


def main(config: str) -> int:
    die_with_parent()
    code = run(load_yaml(config))
    if code:
        leave(code)
    return code


def leave(code: int) -> None:
    """Ends this process at once: other ranks may sit in a collective with it, and it would wait for them at exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
