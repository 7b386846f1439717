"""Answers kept while a task is under way, so that a command that is interrupted, or whose judge fails, does not ask the
model again.

An answer is found by a digest of all that it follows from: checkpoint, prompt with its media, how media are shown, how
answers are drawn.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molmo2_nemo import __version__
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.errors import file_error
from molmo2_nemo.inference.prompt import Prompt
from molmo2_nemo.inference.ranks import from_first, is_first, place, summed
from molmo2_nemo.inference.sampling import Sampling
from molmo2_nemo.inference.seen import named
from molmo2_nemo.rundir.checkpoint_manifest import MANIFEST
from molmo2_nemo.rundir.lines import append_line, read_lines

FIELDS = ("answer", "remarks", "tokens", "picture")  # of a line, that the model or the media had to be asked for
RANDOM = 4  # bytes in the name of a process's file


def digest_of_checkpoint(checkpoint: Path) -> str:
    """Equal for equal weights: of the manifest, which has every file's checksum, or of names, sizes and times."""
    if (checkpoint / MANIFEST).is_file():
        return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    files = [(path, path.stat()) for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return _digest([[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in files])


class KeptAnswers:
    """The answers to a task's questions in a folder of results. Every process has a file of its own there.

    Args:
        folder: of results; None: nothing is kept.
        name: of the task's result.
        checkpoint: what distinguishes it (`digest_of_checkpoint`).
    """

    def __init__(self, folder: Path | None, name: str, checkpoint: str) -> None:
        self.folder, self.name = folder, name
        self.used = 0  # answers of an earlier command
        self._made_with: Any = [__version__, checkpoint]
        self._known: dict[str, dict[str, Any]] = {}
        self._path = None if folder is None else folder / f".{name}.{os.urandom(RANDOM).hex()}.answers"
        self._writes = folder is not None and place().speaks

    def open(self, data: DataConfig, sampling: Sampling) -> None:
        """Reads what is there. A collective of all ranks: all know the same answers.

        Args:
            data: how media are shown.
            sampling: how answers are drawn.
        """
        self._made_with += [repr(data), dataclasses.asdict(sampling)]
        found = {}
        if is_first():
            needed = {"asked": str, "answer": str, "remarks": list, "tokens": int}
            found = {line["asked"]: line for path in self._files() for line in read_lines(path, **needed)}
        self._known = from_first(found)

    def digest(self, prompt: Prompt, number: int) -> str:
        """What an answer follows from.

        Args:
            number: that the draws follow from.
        """
        apart = ("images", "video", "reference")
        words = {f.name: getattr(prompt, f.name) for f in dataclasses.fields(prompt) if f.name not in apart}
        images, video = [named(one) for one in prompt.images], named(prompt.video)
        return _digest([self._made_with, number, words, images, video])

    def find(self, digest: str) -> dict[str, Any] | None:
        """The part of an answered line that is kept; None where it is not."""
        if (line := self._known.get(digest)) is None:
            return None
        self.used += 1
        return {name: line[name] for name in FIELDS if name in line}

    def add(self, digest: str, line: Mapping[str, Any]) -> None:
        """Keeps the answer of a line. Where that cannot be written, says so once, and keeps nothing more."""
        if not self._writes or self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, {"asked": digest, **{name: line[name] for name in FIELDS if name in line}})
        except OSError as error:
            self._writes = False
            print(f"warning: answers under way are not kept any longer: {file_error(error)}", file=sys.stderr)

    def any(self) -> bool:
        """Whether the same command would find something."""
        return any(True for _ in self._files())

    def remove(self) -> None:
        """Forget them, of this task under any settings."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def said(self, count: int) -> list[str]:
        """What to tell the user of answers, `count` in all, that the model was not asked for. A collective of all
        ranks."""
        used = summed({"used": self.used}, replicas=True)["used"]
        if not used:
            return []
        return [
            f"{self.name}: {used:,} of {count:,} answers are those of an earlier command (of the same checkpoint, "
            "prompts and settings)"
        ]

    def _files(self) -> list[Path]:
        """Those of all processes; a longer name with a dot in it is another task's."""
        name = f".{glob.escape(self.name)}.{'?' * 2 * RANDOM}.answers"
        return [] if self.folder is None else sorted(self.folder.glob(name))


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return repr(value)
