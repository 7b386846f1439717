"""Folders that are created completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molmo2_nemo.errors import ConversionError

MODEL_FILE = "molmo2.json"  # in an imported checkpoint; records its model configuration
ORIGIN_FILE = "origin.json"  # of `convert init`: the sources of the checkpoint, and the tensors that were not used


def refuse_own_source(target: Path, *sources: Path, replaceable: str | None = None) -> None:
    """Keep a conversion from replacing what it reads.

    Args:
        replaceable: a file that marks an earlier result; a new folder inside a source, or one with this file, may be
            written. None refuses every folder inside a source.

    Raises:
        ConversionError: `target` is a source, a folder round one, or a folder inside one.
    """
    found = target.resolve()
    for source in (path.resolve() for path in sources):
        if found == source:
            what = "the source itself"
        elif found in source.parents:
            what = f"a folder that holds the source {source}"
        elif source in found.parents and not (replaceable and is_new(found, replaceable)):
            what = f"inside the source {source}"
        else:
            continue
        raise ConversionError(f"the target {target} is {what}, which would be replaced; name another folder")


def is_new(folder: Path, replaceable: str) -> bool:
    """Whether nothing but an earlier result would be replaced."""
    return not folder.exists() or (folder / replaceable).is_file()


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target`, renamed to it on success and removed on failure.

    With `overwrite`, an existing folder is replaced at the end, once the new one is complete.

    Raises:
        ConversionError: `target` is a file, or (without `overwrite`) a folder that is not empty; nothing is written.
    """
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise ConversionError(f"{target} already exists; choose another folder, remove it, or use --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        os.chmod(staging, 0o777 & ~current_umask())  # mkdtemp creates a private folder
        yield staging
        replaced = staging.with_name(f"{staging.name}.old")
        if target.exists():
            os.replace(target, replaced)
        os.replace(staging, target)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def current_umask() -> int:
    """The process's umask (there is no way to read it without setting it)."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
