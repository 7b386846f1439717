"""Which checkpoint a run resumes from, which it may start from, how they are written, and which are kept.

`checkpoints/step=N/` is one checkpoint: Megatron's distributed format in `weights/`, and manifest.json with the size
and SHA-256 of every file. NeMo's mark of an unfinished one lies beside the folder from before the first byte until the
manifest is there, and again while it is removed.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import torch.distributed as dist
from nemo.lightning.ckpt_utils import WEIGHTS_PATH, ckpt_to_dir
from nemo.lightning.io.pl import TrainerContext
from nemo.lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.api import CheckpointException

from molmo2_nemo.errors import ConversionError, UserError
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.settings.run import CheckpointConfig

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StageCheckpoints(ModelCheckpoint):
    """A Megatron distributed checkpoint every `every` steps and at the end.

    Args:
        folder: checkpoints/ of the stage.
        every: steps.
        keep: which ones stay. Nothing is removed before a newer one is whole.
    """

    def __init__(self, folder: str, every: int, keep: CheckpointConfig) -> None:
        super().__init__(
            dirpath=folder,
            filename="{step}",
            monitor=None,
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every,
            save_optim_on_train_end=True,  # a kill between the last checkpoint and the summary resumes from it
            always_save_context=False,
            save_context_on_train_end=True,
        )
        self.folder, self.keep = folder, keep

    def nemo_topk_check_previous_run(self) -> None:
        """Does nothing: checkpoints are not ranked by a metric, so there is none to look up in their names."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step  # a step that was loaded need not be written again

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last step, whatever `every` is, and what NeMo needs to load it without our code."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        newest = Path(self.folder) / checkpoint_manifest.step_folder(trainer.global_step)
        if trainer.is_global_zero and newest.is_dir() and not (newest / "context").exists():
            TrainerContext.from_trainer(trainer).io_dump(newest / "context", yaml_attrs=["model"])

    def _save_last_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Any]) -> None:
        """Saves without removing the checkpoint before, as Lightning would; `_thin` decides what goes."""
        path = f"{self.folder}/{checkpoint_manifest.step_folder(trainer.global_step)}{self.FILE_EXTENSION}"
        self.last_model_path = path
        folder = ckpt_to_dir(path)
        if trainer.is_global_zero and folder.exists():  # damaged, or left by a run that was set back
            _remove(folder)
        self._save_checkpoint(trainer, path)

    def _get_finalize_save_checkpoint_callback(
        self, trainer: Any, filepath: str, global_step: int
    ) -> Callable[[], None]:
        finish = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)

        def finish_with_manifest() -> None:
            """Called on all ranks when all have written, also after an asynchronous save."""
            write_checkpoint_manifest(Path(ckpt_to_dir(filepath)))
            finish()
            if trainer.is_global_zero:
                self._thin()

        return finish_with_manifest

    def _thin(self) -> None:
        """Remove what CheckpointConfig does not keep. A kill in between leaves the mark of an unfinished checkpoint."""
        whole = [p for p in checkpoint_manifest.finished(Path(self.folder)) if not checkpoint_manifest.damage(p)]
        for path in whole[max(1, self.keep.keep_last) :]:
            if not (self.keep.keep_every and checkpoint_manifest.step_of(path) % self.keep.keep_every == 0):
                _remove(path)


class Resume(nl.AutoResume):
    """NeMo's AutoResume, resuming from the whole checkpoint of the highest step.

    AutoResume refuses to start when the only checkpoint is one that a killed run left unfinished; this one passes it by
    (NeMo removes it when training starts) and begins again from `restore_config` or from fresh weights.
    """

    def _find_trainer_ckpt_path(self) -> Path | None:
        folder = Path(str(self.resume_from_directory))
        whole = checkpoint_manifest.newest_whole(folder)
        if whole is None and checkpoint_manifest.finished(folder):
            raise UserError(nothing_whole(folder))
        return whole

    def setup(self, trainer: Any, model: Any = None) -> None:
        if self.restore_config and self._find_trainer_ckpt_path() is None and model is not None:
            check_model(Path(self.restore_config.path), model.model_config)
        super().setup(trainer, model)


class VerifyingStrategy(nl.MegatronStrategy):
    """NeMo's MegatronStrategy, which compares a checkpoint with its manifest before loading it.

    A damaged one is put aside as `damaged-step=N` and the newest whole one before it is taken, loudly. Each rank reads
    its share of the files.
    """

    fresh_adapters = False

    def load_checkpoint(self, checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        path = Path(checkpoint_path)
        path = path.parent if path.name == WEIGHTS_PATH else path
        sums = self.trainer.checkpoint_callback.keep.verify
        if selective_restore:
            if checkpoint_manifest.read(path) is not None and (wrong := faults_together(path, sums)):
                raise UserError(f"init_from={path} is damaged: {wrong[0]}; name another checkpoint")
            self.fresh_adapters = self.lightning_module.model_config.lora is not None and not has_adapters(path)
            with self.lightning_module.module.without_adapters(self.fresh_adapters):
                return super().load_checkpoint(path, selective_restore)
        folder = path.parent
        for candidate in _agreed(checkpoint_manifest.finished(folder)):
            wrong = faults_together(candidate, sums)
            if not wrong:
                return super().load_checkpoint(candidate)
            dist.barrier()
            if self.is_global_zero:
                aside = candidate.with_name(f"damaged-{candidate.name}")
                shutil.rmtree(aside, ignore_errors=True)
                candidate.rename(aside)
                print(f"checkpoint {candidate} is damaged: {wrong[0]}. It is now {aside}; going back to the one before")
        raise UserError(nothing_whole(folder))

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Adapters that start in this stage are not in the checkpoint of the stage before: they keep their values."""
        super().load_model_state_dict(checkpoint, strict and not self.fresh_adapters)


def write_checkpoint_manifest(checkpoint: Path) -> None:
    """Checksums of all files, each rank reading its share; rank 0 writes the list. A collective of all ranks."""
    files = checkpoint_manifest.share(checkpoint, dist.get_rank(), dist.get_world_size())
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, checkpoint_manifest.describe(checkpoint, files))
    if dist.get_rank() == 0:
        checkpoint_manifest.write(checkpoint, {name: entry for part in parts for name, entry in part.items()})


def faults_together(checkpoint: Path, sums: bool) -> list[str]:
    """What is wrong with a checkpoint, found by all ranks together; the same answer on each rank."""
    size = dist.get_world_size()
    found: list[Any] = [None] * size
    dist.all_gather_object(found, checkpoint_manifest.damage(checkpoint, sums=sums, rank=dist.get_rank(), size=size))
    return [fault for part in found for fault in part]


def nothing_whole(folder: Path) -> str:
    """The message for a folder in which every checkpoint is damaged."""
    named = [(path.name, checkpoint_manifest.damage(path)) for path in checkpoint_manifest.finished(folder)]
    found = "; ".join([f"{name}: {damage[0]}" for name, damage in named if damage][:3]) or "all were damaged"
    return f"no checkpoint in {folder} is whole ({found}). Remove the folder to start the stage again"


def not_written(error: BaseException, folder: Path) -> Exception | None:
    """The error to show if `error` comes from a checkpoint that could not be written; None if it does not.

    torch hides the system's error number on the way from writer to trainer ("unexpected pos" is its word for a full
    disk), so any failure to write is reported with the free space of its disk.

    Args:
        folder: checkpoints/ of the stage.
    """
    if isinstance(error, CheckpointException):
        if not error.failures:  # rank 0 has them
            return RuntimeError("another process could not write its part of a checkpoint")
        why = "; ".join(str(failure[0]) for failure in list(error.failures.values())[:2])
    elif isinstance(error, OSError) and error.errno in NO_ROOM:
        why = str(error)
    else:
        return None
    before = checkpoint_manifest.newest_whole(folder)
    kept = f"{before} is whole, and the same command resumes from it" if before else "no checkpoint was written before"
    left = shutil.disk_usage(folder).free / 2**30
    return UserError(
        f"a checkpoint in {folder} could not be written ({why}). Its disk has {left:.1f} GiB left; is it full, or is a "
        f"quota used up? {kept}"
    )


def check_model(checkpoint: Path, model_config: Molmo2Config) -> None:
    """Refuse a checkpoint of another model before anything is built from it.

    Raises:
        UserError: no finished checkpoint there, or its tensors are not this model's; names the differences.
    """
    from molmo2_nemo.convert.megatron_io import MegatronCheckpoint

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
    from molmo2_nemo.convert.megatron_io import MegatronCheckpoint

    return MegatronCheckpoint(checkpoint).has_adapters


def _agreed(paths: list[Path]) -> list[Path]:
    """Rank 0's list on all ranks: a shared file system may show a new folder late."""
    shown: list[Any] = [[str(p) for p in paths]]
    dist.broadcast_object_list(shown, 0)
    return [Path(p) for p in shown[0]]


def _remove(checkpoint: Path) -> None:
    mark = checkpoint.with_name(checkpoint.name + checkpoint_manifest.UNFINISHED)
    mark.touch()
    shutil.rmtree(checkpoint, ignore_errors=True)
    if not checkpoint.exists():
        mark.unlink(missing_ok=True)
