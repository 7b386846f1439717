"""How the attempts of a stage's Slurm jobs failed, as the jobs' scripts found out (launch/slurm/script.py).

`<output_dir>/slurm/<stage>/attempt-<job>-<restart>/verdict` is plain text, because where a script runs no JSON writer
is certain to be installed: seconds since the epoch, then "failed" or "user_error", then the message.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Any

from molmo2_nemo.rundir.paths import ATTEMPTS, SLURM, VERDICT


class Ending(StrEnum):
    """How an attempt ended: the words of its files."""

    FAILED = "failed"
    USER_ERROR = "user_error"
    PREEMPTED = "preempted"  # in `outcome` only: it is no failure


def read_verdicts(stage: Path) -> list[dict[str, Any]]:
    """One dictionary per attempt that failed, like those of the stage's errors.jsonl; files that say something else are
    left out.

    Args:
        stage: the stage's folder, `<output_dir>/<stage>`.
    """
    found = (_read(path) for path in sorted((stage.parent / SLURM / stage.name).glob(f"{ATTEMPTS}*/{VERDICT}")))
    return [verdict for verdict in found if verdict is not None]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        time, how, message = path.read_text(encoding="utf-8", errors="replace").split("\n", 2)
        if how not in (Ending.FAILED, Ending.USER_ERROR):
            return None
        user_error = how == Ending.USER_ERROR
        return {"time": float(time), "message": _one_line(message), "user_error": user_error, "cause": True}
    except (OSError, ValueError):
        return None


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f]", "", re.sub(r"[\n\t]", " ", text)).rstrip(" ")
