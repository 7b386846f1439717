"""Which checkpoint a run goes on from, which it may start from, and how NeMo writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nemo.lightning as nl
from nemo.lightning.pytorch.callbacks import ModelCheckpoint


class LatestCheckpoint(ModelCheckpoint):
    """A Megatron distributed checkpoint every `every` steps and at the end; only the newest is kept.

    NeMo marks a checkpoint as unfinished while it is being written and removes the one before it only afterwards, so
    there is always a whole one to go on from.
    """

    def __init__(self, folder: str, every: int) -> None:
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

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last step, whatever `every` is. (NeMo's own rule leaves out a run of a single step.)"""
        if trainer.global_step > 0 and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_end(trainer, pl_module)


class Resume(nl.AutoResume):
    """NeMo's AutoResume, going on from the finished checkpoint of the highest step.

    AutoResume refuses to start when the only checkpoint is one that a killed run left unfinished; this one passes it by
    (NeMo removes it when training starts) and begins again from `restore_config` or from fresh weights.
    """

    def _find_trainer_ckpt_path(self) -> Path | None:
        return latest_checkpoint(Path(str(self.resume_from_directory)))

    def setup(self, trainer: Any, model: Any = None) -> None:
        if self.restore_config and self._find_trainer_ckpt_path() is None and model is not None:
            check_model(Path(self.restore_config.path), model.molmo2)
        super().setup(trainer, model)


def latest_checkpoint(folder: Path) -> Path | None:
    """The finished checkpoint of the highest step in a stage's checkpoints/ folder; None where there is none."""
    found = {}
    for path in folder.glob("step=*"):
        if path.is_dir() and not ModelCheckpoint.is_checkpoint_unfinished(path):
            found[int(path.name.removeprefix("step=").split("-")[0])] = path
    return found[max(found)] if found else None


def check_model(checkpoint: Path, molmo2: Any) -> None:
    """Refuse a checkpoint of another model before anything is built from it.

    Raises:
        ValueError: no finished checkpoint there, or its tensors are not this model's; names the differences.
    """
    from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
    from molmo2_nemo.convert.names import ConversionError

    try:
        MegatronCheckpoint(checkpoint).check(molmo2)
    except ConversionError as error:
        raise ValueError(
            f"init_from={checkpoint} cannot start a {molmo2.name!r} model: {error}. Name a checkpoint of the same "
            "model, or choose the model it was made from"
        ) from None
