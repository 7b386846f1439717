"""Errors a user can cause, and how they are shown: one line, no traceback, exit code 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

USER_ERROR = 2  # exit code when the user's input is the cause
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
PREEMPTED = 75  # exit code after a signal took the machine away and a checkpoint was saved: start again to go on


class UserError(ValueError):
    """What was seen, what was expected, what to change; shown without a traceback."""


class Preempted(Exception):
    """A signal (SIGTERM, SIGUSR1) asked the run to stop; a checkpoint is saved. Raised in every process of the run."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of known words when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else "nothing is known here"


def show_error(error: BaseException | str) -> None:
    """Prints the message to stderr under the command's name."""
    print(f"molmo2: error: {error}", file=sys.stderr)
