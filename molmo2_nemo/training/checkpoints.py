"""Checkpoints, as all ranks see them together: written with a manifest, verified, fallen back from, thinned out.

`checkpoints/step=N/` is one checkpoint: the host's folder with Megatron's distributed format in it, and manifest.json
with the size and SHA-256 of every file. The mark of an unfinished one lies beside the folder from before the first byte
until the manifest is there, and again while it is removed.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.errors import GONE, NO_ROOM, READ_ONLY, ConversionError, UserError
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.paths import CHECKPOINTS
from molmo2_nemo.settings.run import CheckpointConfig
from molmo2_nemo.training.whereabouts import Work, here


def write_checkpoint_manifest(checkpoint: Path) -> None:
    """Checksums of all files, each rank reading its share; rank 0 writes the list. A collective of all ranks."""
    here.at(Work.SAVING)
    files = checkpoint_manifest.share(checkpoint, dist.get_rank(), dist.get_world_size())
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, checkpoint_manifest.describe(checkpoint, files))
    if dist.get_rank() == 0:
        checkpoint_manifest.write(checkpoint, {name: entry for part in parts for name, entry in part.items()})


def damage_together(checkpoint: Path, sums: bool) -> list[str]:
    """What is wrong with a checkpoint, each rank reading its share; the same answer on each. A collective of all ranks.

    Args:
        sums: compare checksums, not sizes alone.
    """
    size = dist.get_world_size()
    found: list[Any] = [None] * size
    dist.all_gather_object(found, checkpoint_manifest.damage(checkpoint, sums=sums, rank=dist.get_rank(), size=size))
    return [fault for part in found for fault in part]


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """While a checkpoint is loaded: where its contents are not as expected, it is named, and the versions of
    Megatron-core and torch that wrote it and that read it, if they differ. Memory that is short and files that cannot
    be opened stay what they are.

    Raises:
        UserError: in place of what torch or Megatron-core raise; modelopt has converted the model.
    """
    checkpoint_manifest.refuse_converted(checkpoint)
    try:
        yield
    except (torch.OutOfMemoryError, OSError, UserError):
        raise
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        other = checkpoint_manifest.other_versions(checkpoint)
        if not other and not isinstance(error, CheckpointException):
            raise
        by = f": {other}" if other else ""
        raise UserError(f"{checkpoint} cannot be read ({type(error).__name__}: {_why(error)}){by}") from error


def _why(error: BaseException) -> str:
    """What happened, in one line; torch's exception has it by rank."""
    if isinstance(error, CheckpointException) and error.failures:
        reasons = dict.fromkeys(str(failure[0]) for failure in error.failures.values())  # one that all ranks met once
        return "; ".join(list(reasons)[:2])
    return str(error)


def refuse_damaged(checkpoint: Path, sums: bool) -> None:
    """Compare the checkpoint that a stage starts from with its manifest, where it has one. A collective of all ranks.

    Raises:
        UserError: it is damaged.
    """
    if checkpoint_manifest.read(checkpoint) is not None and (wrong := damage_together(checkpoint, sums)):
        raise UserError(f"init_from={checkpoint} is damaged: {wrong[0]}; name another checkpoint")


def newest_undamaged(folder: Path, sums: bool) -> Path:
    """The checkpoint to resume from. Damaged ones that are newer are put aside as `damaged-step=N`, loudly. A
    collective of all ranks.

    Args:
        folder: checkpoints/ of the stage.

    Raises:
        UserError: all are damaged.
    """
    for candidate in _agreed(checkpoint_manifest.finished(folder)):
        wrong = damage_together(candidate, sums)
        if not wrong:
            return candidate
        dist.barrier()
        if dist.get_rank() == 0:
            aside = candidate.with_name(f"damaged-{candidate.name}")
            shutil.rmtree(aside, ignore_errors=True)
            candidate.rename(aside)
            print(f"checkpoint {candidate} is damaged: {wrong[0]}. It is now {aside}; going back to the one before")
    raise UserError(nothing_whole(folder))


def newest_to_resume(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step, by the sizes of its files; None where nothing was written yet. One that
    a killed run left unfinished does not count.

    Raises:
        UserError: there are some, all damaged.
    """
    whole = checkpoint_manifest.newest_whole(folder)
    if whole is None and checkpoint_manifest.finished(folder):
        raise UserError(nothing_whole(folder))
    return whole


def nothing_whole(folder: Path) -> str:
    """The message for a folder in which every checkpoint is damaged."""
    named = [(path.name, checkpoint_manifest.damage(path)) for path in checkpoint_manifest.finished(folder)]
    found = "; ".join([f"{name}: {damage[0]}" for name, damage in named if damage][:3]) or "all were damaged"
    return f"no checkpoint in {folder} is whole ({found}). Remove the folder to start the stage again"


def thin_out(folder: Path, keep: CheckpointConfig) -> None:
    """Remove what `keep` does not keep; on one rank. Nothing goes before a newer one is whole. A kill in between
    leaves the mark of an unfinished checkpoint."""
    whole = [p for p in checkpoint_manifest.finished(folder) if not checkpoint_manifest.damage(p)]
    for path in whole[max(1, keep.keep_last) :]:
        if not (keep.keep_every and checkpoint_manifest.step_of(path) % keep.keep_every == 0):
            remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, marked as unfinished while that takes."""
    mark = checkpoint.with_name(checkpoint.name + checkpoint_manifest.UNFINISHED)
    mark.touch()
    shutil.rmtree(checkpoint, ignore_errors=True)
    if not checkpoint.exists():
        mark.unlink(missing_ok=True)


def not_written(error: BaseException, stage: Path) -> Exception | None:
    """The error to show if `error` comes from a file of the stage that could not be written: its path, what is kept,
    and what to do. None if it does not.

    torch hides the system's error number on the way from writer to trainer ("unexpected pos" is its word for a full
    disk), so any failure to write a checkpoint is reported with the free space of its disk.

    Args:
        stage: the stage's folder.

    Returns:
        A `UserError` where somebody must make room or give a permission; a `RuntimeError` where the file system does
        not answer, which may be over when the run is started again.
    """
    folder = stage / CHECKPOINTS
    kind, what = None, f"a checkpoint in {folder}"
    if isinstance(error, CheckpointException):
        if not error.failures:  # rank 0 has them
            return RuntimeError("another process could not write its part of a checkpoint")
        why = _why(error)
    elif isinstance(error, OSError) and error.errno in (*NO_ROOM, *READ_ONLY, *GONE):
        kind, why = error.errno, error.strerror or str(error)
        named = error.filename if isinstance(error.filename, str) else None
        if named is None and kind in READ_ONLY:
            return None  # it may be any file, and one that was to be read
        if named is not None and not Path(named).absolute().is_relative_to(stage.absolute()):
            return None
        if named is not None and not Path(named).absolute().is_relative_to(folder.absolute()):
            what = named
    elif isinstance(error, FileNotFoundError) and not stage.is_dir():
        kind, why, what = errno.ENODEV, f"{error.filename}: {error.strerror}", f"the run's folder {stage}"
    else:
        return None
    kept = "; what was saved before cannot be seen"
    room = "Its disk does not say how much it has left"
    with suppress(OSError):
        room = f"Its disk has {shutil.disk_usage(stage).free / 2**30:.1f} GiB left"
        before = checkpoint_manifest.newest_whole(folder)
        kept = f". {before} is whole, and the same command resumes from it" if before else ". No checkpoint was written"
    if kind in GONE:
        return RuntimeError(f"{what} could not be written ({why}); is its file system still mounted?{_then(kept)}")
    if kind in READ_ONLY:
        return UserError(f"{what} could not be written ({why}). Allow this user to write there{kept}")
    return UserError(f"{what} could not be written ({why}). {room}; is it full, or is a quota used up?{_then(kept)}")


def _then(kept: str) -> str:
    """What is kept, after a question."""
    return f" {kept.lstrip('.; ')}"


def check_model(checkpoint: Path, model_config: Molmo2Config) -> None:
    """Refuse a checkpoint of another model before anything is built from it.

    Raises:
        UserError: no finished checkpoint there, or its tensors are not this model's; names the differences.
    """
    found = None
    try:
        found = MegatronCheckpoint(checkpoint)
        without = dataclasses.replace(model_config, lora=None)
        found.check(model_config if found.has_adapters else without)
    except ConversionError as error:
        if found is not None and model_config.lora is None and found.has_adapters:
            raise UserError(
                f"init_from={checkpoint} has adapters (stage.lora), this stage has none. Merge them first: molmo2 "
                f"convert export {checkpoint} HF, then molmo2 convert import HF CHECKPOINT, and start from that"
            ) from None
        raise UserError(
            f"init_from={checkpoint} cannot start a {model_config.name!r} model: {error}. Name a checkpoint of the "
            "same model, or choose the model it was made from"
        ) from None


def has_adapters(checkpoint: Path) -> bool:
    """Whether a checkpoint holds LoRA adapters."""
    return MegatronCheckpoint(checkpoint).has_adapters


def _agreed(paths: list[Path]) -> list[Path]:
    """Rank 0's list on all ranks: a shared file system may show a new folder late."""
    shown: list[Any] = [[str(p) for p in paths]]
    dist.broadcast_object_list(shown, 0)
    return [Path(p) for p in shown[0]]
