"""How checkpoints are written, kept and loaded, through NeMo's hooks; training/checkpoints.py has the rules.

NeMo's folder of a checkpoint has Megatron's distributed format in `weights/`, and `context/`: what NeMo needs to load
it without our code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo.lightning as nl
from megatron.core.utils import get_attr_wrapped_model
from nemo.lightning.ckpt_utils import WEIGHTS_PATH, ckpt_to_dir
from nemo.lightning.io.pl import TrainerContext
from nemo.lightning.pytorch.callbacks import ModelCheckpoint

from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.settings.run import CheckpointConfig
from molmo2_nemo.training import checkpoints, fsdp
from molmo2_nemo.training.model import Loaded
from molmo2_nemo.training.overlap import finish_gathers
from molmo2_nemo.training.whereabouts import Work, here


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
        self.folder, self.every, self.keep = folder, every, keep

    def nemo_topk_check_previous_run(self) -> None:
        """Does nothing: checkpoints are not ranked by a metric, so there is none to look up in their names."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step  # a step that was loaded need not be written again

    def save_due(self, trainer: Any) -> None:
        """Save this step now if it is to be saved at all, before something else that takes time. A collective of all
        ranks."""
        step = trainer.global_step
        if self._last_global_step_saved != step and (step % self.every == 0 or step == trainer.max_steps):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last step, whatever `every` is, and what NeMo needs to load it without our code."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        newest = Path(self.folder) / checkpoint_manifest.step_folder(trainer.global_step)
        if trainer.is_global_zero and newest.is_dir() and not (newest / "context").exists():
            TrainerContext.from_trainer(trainer).io_dump(newest / "context", yaml_attrs=["model"])

    def _save_last_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Any]) -> None:
        """Saves without removing the checkpoint before, as Lightning would; `thin_out` decides what goes."""
        path = f"{self.folder}/{checkpoint_manifest.step_folder(trainer.global_step)}{self.FILE_EXTENSION}"
        self.last_model_path = path
        folder = ckpt_to_dir(path)
        if trainer.is_global_zero and folder.exists():  # damaged, or left by a run that was set back
            checkpoints.remove(folder)
        self._save_checkpoint(trainer, path)

    def _get_finalize_save_checkpoint_callback(
        self, trainer: Any, filepath: str, global_step: int
    ) -> Callable[[], None]:
        finish = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)

        def finish_with_manifest() -> None:
            """Called on all ranks when all have written, also after an asynchronous save."""
            checkpoints.write_checkpoint_manifest(Path(ckpt_to_dir(filepath)))
            finish()
            if trainer.is_global_zero:
                checkpoints.thin_out(Path(self.folder), self.keep)

        return finish_with_manifest


class Resume(nl.AutoResume):
    """NeMo's AutoResume, resuming from the whole checkpoint of the highest step.

    AutoResume refuses to start when the only checkpoint is one that a killed run left unfinished; this one passes it by
    (NeMo removes it when training starts) and begins again from `restore_config` or from fresh weights.
    """

    def _find_trainer_ckpt_path(self) -> Path | None:
        return checkpoints.newest_to_resume(Path(str(self.resume_from_directory)))

    def setup(self, trainer: Any, model: Any = None) -> None:
        if self.restore_config and self._find_trainer_ckpt_path() is None and model is not None:
            checkpoints.check_model(Path(self.restore_config.path), model.model_config)
        super().setup(trainer, model)


def weights_to_come(trainer: Any, model_config: Molmo2Config) -> Loaded:
    """What a checkpoint will bring once the model is built: the stage's own, or the one it starts from."""
    if trainer is None:
        return "nothing"
    if trainer.ckpt_path:
        return "all"
    restore = getattr(trainer.strategy, "restore_config", None)
    if restore is None or not restore.load_model_state:
        return "nothing"
    own = model_config.lora is None or checkpoints.has_adapters(_folder(restore.path))
    return "all" if own else "all but adapters"


def _folder(checkpoint: str | Path) -> Path:
    """A checkpoint's folder, also where the one with its weights is named."""
    path = Path(checkpoint)
    return path.parent if path.name == WEIGHTS_PATH else path


class VerifyingStrategy(nl.MegatronStrategy):
    """NeMo's MegatronStrategy, which compares a checkpoint with its manifest before loading it.

    A damaged one is put aside as `damaged-step=N` and the newest whole one before it is taken, loudly. Each rank reads
    its share of the files.
    """

    fresh_adapters = False

    def init_model_parallel(self) -> None:
        """Notes how a checkpoint holds the model before Megatron-FSDP takes its parameters apart."""
        models = [part.module for part in self.megatron_parallel] if self._fsdp else []
        saved = [fsdp.whole_entries(model, self.sharded_state_dict_metadata) for model in models]
        try:
            super().init_model_parallel()
        except RuntimeError as error:
            if not self._fsdp or "is invalid for input of size" not in str(error):
                raise
            raise UserError(
                "parallel.fsdp=megatron: Megatron-FSDP does not find a place for this model's layers in which every "
                f"process has whole rows ({error}); take another number of processes, another stage.lora.rank, or "
                "parallel.fsdp=none"
            ) from error
        for part, entries in zip(self.megatron_parallel, saved, strict=False):
            fsdp.install(part.module, entries)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Waits for parameters that are still being gathered. NeMo would gather anew what a rank has waited for
        already, which after validation is not the same on all ranks."""
        here.at(Work.SAVING)
        finish_gathers([part.module for part in self.megatron_parallel])
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        path = _folder(checkpoint_path)
        sums = self.trainer.checkpoint_callback.keep.verify
        if not selective_restore:
            path = checkpoints.newest_undamaged(path.parent, sums)
            self._say(f"resuming from {path}")
            with checkpoints.reading(path):
                return super().load_checkpoint(path)
        checkpoints.refuse_damaged(path, sums)
        self._say(f"reading the weights of {path}")
        adapters = self.lightning_module.model_config.lora is not None
        self.fresh_adapters = adapters and not checkpoints.has_adapters(path)
        without = get_attr_wrapped_model(self.lightning_module.module, "without_adapters")  # bf16 wraps once more
        fresh = without(self.fresh_adapters)
        with fresh, checkpoints.reading(path):
            return super().load_checkpoint(path, selective_restore)

    def _say(self, what: str) -> None:
        """A line on the terminal, once: reading takes minutes for the large models."""
        if self.trainer.is_global_zero:
            print(what, flush=True)

    def teardown(self) -> None:
        """Nothing goes to the host at the end: Lightning would copy the optimizer's state there, also after a failure
        for want of memory: tens of GB on a node."""
        self.optimizers: list[Any] = []
        super().teardown()

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Adapters that start in this stage are not in the checkpoint of the stage before: they keep their values."""
        strict = strict and not self.fresh_adapters
        if not self._fsdp:
            super().load_model_state_dict(checkpoint, strict)
            return
        for part in self.megatron_parallel:
            alone = "optimizer" not in checkpoint
            fsdp.load_model_state(part.module, checkpoint.get("state_dict", checkpoint), main=alone, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any, selective_restore: bool = False) -> None:
        """NeMo would take the state of sharded parameters for Megatron-FSDP's own format."""
        if not self._fsdp:
            super().load_optimizer_state_dict(checkpoint, selective_restore)
        elif self.should_restore_optimizer_states(selective_restore):
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer"], strict=True):
                optimizer.load_state_dict(state)

    @property
    def sharded_state_dict_metadata(self) -> dict[str, Any]:
        """One format of the optimizer's state, whoever writes it."""
        shared = {"distrib_optim_sharding_type": "fully_reshardable"} if self._fsdp else {}
        return super().sharded_state_dict_metadata | shared
