"""Which settings may change when a run resumes. With any other change its checkpoint would be another run's."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.config_file import read_config
from molmo2_nemo.rundir.paths import CHECKPOINTS, CONFIG, stage_dir
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import by_dotted_key, to_dict

# Patterns of dotted keys. These change no number, so that they may differ even from those of a job that waits or runs.
FREE = (
    *("output_dir", "stages", "init_from", "save_every", "log_every"),
    *("data.num_workers", "data.prefetch", "data.ahead_mib"),
    "data.text.templates",  # where the file is; its fingerprint is a setting of its own
    *("data.store.*", "cluster.*", "checkpoint.*", "log.*", "memory.*", "validation.*", "evaluation.*"),
)
# What else may differ between two attempts: the layout, which changes numbers by rounding only, and when to give up.
LAYOUT = (
    *("parallel.*", "kernels.*", "stage.micro_batch_size", "model.attention", "faults.*", "data.share_packs"),
    *("data.max_bad_in_a_row", "data.max_bad_share", "data.quarantine", "data.video.decoder"),
    "data.feature_cache.*",
)
# But not this one while the stage is not finished: Megatron cannot read one kind of optimizer state as the other.
FIXED = ("parallel.distributed_optimizer",)
# Where the shards are, while the stage is not finished: the loader compares their fingerprints with the checkpoint.
MOVED = ("data.root", "data.sources.*.path")
NAMED = 4  # changes that an error lists


def changed_settings(cfg: RunConfig, path: Any, free: Sequence[str], fixed: Sequence[str] = ()) -> list[str]:
    """`key was A, is now B` for each setting that may not change and has.

    Args:
        path: of the configuration before, a `Path` or what stands for one on another machine; without a file nothing
            has changed.
        free: patterns of keys that may change.
        fixed: keys that may not, whatever `free` says.

    Raises:
        UserError: the file is damaged.
    """
    before = read_config(path)
    return [] if before is None else _changes(cfg, before, free, fixed)


def refuse_changes(cfg: RunConfig, folder: Any, checkpoint: str, finished: bool = False) -> None:
    """A stage that was trained resumes, or counts as finished, only with the settings that it was trained with;
    max_steps may grow. To be called before config.yaml is written.

    Args:
        folder: the stage's, a `Path` or what stands for one on another machine.
        checkpoint: what it would resume from, for the message.
        finished: the stage is finished and will not be trained further.

    Raises:
        UserError: names the settings and what to do.
    """
    before = read_config(folder / CONFIG)
    if before is None:
        return
    free = (*FREE, *LAYOUT) if finished else (*FREE, *LAYOUT, *MOVED)
    if cfg.stage.max_steps > before.stage.max_steps:
        free = (*free, "stage.max_steps")
    changes = _changes(cfg, before, free, () if finished else FIXED)
    if changes:
        more = f" and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
        raise UserError(
            f"{folder} was trained with other settings: {'; '.join(changes[:NAMED])}{more}. Use the old settings, or "
            f"start over in another output_dir=... (with init_from={checkpoint} from the weights that are there)"
        )


def refuse_other_run(cfg: RunConfig) -> None:
    """`refuse_changes` for a stage that has a checkpoint among this machine's files. Prints what will be different.

    Raises:
        UserError: as `refuse_changes`.
    """
    folder = stage_dir(cfg)
    found = checkpoint_manifest.finished(folder / CHECKPOINTS)
    before = read_config(folder / CONFIG) if found else None
    if before is None:
        return  # nothing to resume from, or no configuration to compare with
    refuse_changes(cfg, folder, str(found[0]))
    if before.init_from != cfg.init_from:
        print(f"init_from={cfg.init_from} is not read: {cfg.stage.name} resumes from {found[0]}", flush=True)
    if before.stage.max_steps < cfg.stage.max_steps:
        change = f"stage.max_steps was {before.stage.max_steps}, is now {cfg.stage.max_steps}"
        print(f"{change}: from here on the learning rates follow the longer schedule", flush=True)


def _changes(cfg: RunConfig, before: RunConfig, free: Sequence[str], fixed: Sequence[str]) -> list[str]:
    old, new = by_dotted_key(to_dict(before)), by_dotted_key(to_dict(cfg))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return [
        f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
        for key in changed
        if key in fixed or not any(fnmatchcase(key, pattern) for pattern in free)
    ]
