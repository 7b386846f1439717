"""Errors a user can cause, and how they are shown: one line, no traceback, exit code 2."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

USER_ERROR = 2  # exit code when the user's input is the cause
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
PREEMPTED = 75  # exit code after a signal ended the run and a checkpoint was saved: start again to resume


class UserError(ValueError):
    """What was seen, what was expected, what to change; shown without a traceback."""


class DataError(UserError):
    """Something about the data a user gave is wrong; the message names the place."""


class ConversionError(UserError):
    """A checkpoint or model folder that cannot be converted; the message names the file or tensor."""


class Preempted(Exception):
    """A signal (SIGTERM, SIGUSR1) asked the run to stop; a checkpoint is saved. Raised in every process of the run."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of known words when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else "nothing is known here"


def unit_of(count: float) -> tuple[int, str]:
    """The unit that so many bytes are said in: its bytes and its name."""
    return (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")


def sized(count: float) -> str:
    """Bytes as people read them: `12 GiB`, `3.4 GiB`, `56 MiB`, `7.8 MiB`."""
    unit, name = unit_of(count)
    return f"{count / unit:,.0f} {name}" if count >= 10 * unit else f"{count / unit:.1f} {name}"


def plural(count: int, one: str, many: str = "") -> str:
    """A count and its noun: "1 GPU", "1,024 GPUs".

    Args:
        many: where it is not `one` with an s.
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


# What the system says about a file system that is full, may only be read, or is not there any longer.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
GONE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO)
HINTS = {  # what to change, where the system's own words do not say it
    errno.EEXIST: "something of that name is there; name another, or remove it",
    errno.EISDIR: "name a file",
    errno.EROFS: "name a place on another file system",
    errno.ENOSPC: "make room there, or name a place on another file system",
    errno.EDQUOT: "make room there, or name a place on another file system",
    errno.EFBIG: "a quota, or the file system's largest file: name a place on another file system",
    **dict.fromkeys(GONE, "is its file system still mounted, does its server answer?"),
    errno.EMFILE: "ulimit -n shows the limit and raises it",
}
# Only wrong code gets these, when the error names no file.
OURS = frozenset({errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTSOCK, errno.ESPIPE, errno.ECHILD})
OWN_PACKAGES = ("molmo2_nemo", "data_prep")  # a module missing inside them cannot be installed


def file_error(error: OSError) -> str:
    """One line for what the system says about a file or folder: which, what is wrong, what to change."""
    if error.strerror is None:  # a library's own text
        return " ".join(str(error).split()) or type(error).__name__
    names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes, os.PathLike))]
    hint = HINTS.get(error.errno or 0, "")
    if error.errno == errno.ENOTDIR and names and (file := blocking_file(Path(names[0]))) is not None:
        hint = f"{file} is a file" if str(file) != names[0] else "name a folder"
    text = ": ".join([*([" -> ".join(names)] if names else []), error.strerror])
    return f"{text}; {hint}" if hint else text


def user_message(error: BaseException) -> str | None:
    """One line about an error that the user can fix: a `UserError`, a file that the system refuses, a missing package.
    None for anything else, which is a fault in our code."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return None if error.errno in OURS and error.filename is None else file_error(error)
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] not in ("", *OWN_PACKAGES):
        return f"{error}; `molmo2 doctor` says what is missing and how to get it"
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside the block, the system's errors that name no file (a full disk) name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror is not None and error.errno not in OURS:
            error.filename = str(path)
        raise


@contextmanager
def of_setting(setting: str) -> Iterator[None]:
    """Inside the block, what the system says about a file or folder is a `UserError` that begins with the setting
    (`output_dir=/data/run`) that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is None or isinstance(error, BlockingIOError):
            raise
        raise UserError(f"{setting}: {file_error(error)}") from error


def blocking_file(path: Path) -> Path | None:
    """The file because of which `path` is not and cannot become a folder: itself, or one above it. None if there is
    none."""
    for part in (path, *path.parents):
        try:
            if part.is_dir():
                return None
            if part.exists() or part.is_symlink():
                return part
        except OSError:  # a name that is too long, a folder that may not be looked into
            return None
    return None


def read_text(path: Any) -> str:
    """The text of a file; `path` may also be one on another machine.

    Raises:
        UserError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8") if isinstance(path, Path) else path.read_text()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file: byte {error.start + 1} is not UTF-8") from None


def verbose() -> bool:
    """Whether messages of libraries and tracebacks of a user's mistakes are to be shown: MOLMO2_VERBOSE=1."""
    return os.environ.get("MOLMO2_VERBOSE") == "1"


def show_error(error: BaseException | str) -> None:
    """Prints the message to stderr under the command's name."""
    print(f"molmo2: error: {error}", file=sys.stderr)
