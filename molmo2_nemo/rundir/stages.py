"""A run's folder: `<output_dir>/<stage>/` with config.yaml, metrics.jsonl and, when finished, summary.json. Whether a
stage is finished, with which settings it may be gone on with, and who may work in its folder is decided here."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError, read_text
from molmo2_nemo.files import write_text
from molmo2_nemo.rundir import manifest
from molmo2_nemo.rundir.lines import append_line, read_lines
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import flatten, read_yaml, to_dict, to_yaml

# Settings that a job which waits or runs need not have been submitted with: they change no number.
FREE = (
    *("output_dir", "init_from", "save_every", "log_every", "data.num_workers", "data.prefetch"),
    *("cluster.*", "checkpoint.*", "log.*", "memory.*", "validation.*"),
)
# What else may differ between two attempts: the layout, which changes numbers by rounding only, and when to give up.
LAYOUT = (
    *("parallel.*", "stage.micro_batch_size", "model.attention", "faults.*", "data.share_packs"),
    *("data.max_bad_in_a_row", "data.max_bad_share", "data.quarantine"),
)
# But not this one while the stage is not finished: Megatron cannot read one kind of optimizer state as the other.
FIXED = ("parallel.distributed_optimizer",)
# Where the shards are, while the stage is not finished: the loader compares their fingerprints with the checkpoint.
MOVED = ("data.root", "data.sources.*.path")

LOCK_POLL = 1.0  # seconds between two looks at a lock that another run holds


def stage_dir(cfg: RunConfig) -> Path:
    return Path(cfg.output_dir) / cfg.stage.name


def write_config(cfg: RunConfig) -> Path:
    """Writes the resolved configuration where the run keeps it."""
    folder = stage_dir(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    write_text(path, to_yaml(cfg))
    return path


class Locked(UserError):
    """Another run is at work in the folder."""


@contextmanager
def only_run(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Keeps a second run out of the folder while this one lasts; the system lifts the lock of a killed process.

    Args:
        wait: seconds to wait for another run to end. On a network file system the lock of a node that died is lifted
            only when its lease ends.

    Raises:
        Locked: another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the folder: NeMo's logger moves the files that it finds inside.
    with open(folder.parent / f".{folder.name}.lock", "a") as file:
        deadline = time.monotonic() + wait
        while not _locked(file):
            if time.monotonic() >= deadline:
                waited = f" and still is after {wait:.0f} s" if wait else ""
                raise Locked(
                    f"another run is at work in {folder}{waited}; wait for it, stop it, or take another output_dir"
                )
            time.sleep(LOCK_POLL)
        yield


def _locked(file: Any) -> bool:
    """False if somebody else has locked the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def summary(folder: Any, max_steps: int | None = None) -> dict[str, Any] | None:
    """What a finished stage says of itself, with its checkpoint as a path; None while it is not finished.

    A stage is finished when its summary counts as many steps as it is to have.

    Args:
        folder: the stage's, a `Path` or what stands for one on another machine.
        max_steps: how many it is to have; default: what its config.yaml says.

    Raises:
        UserError: summary.json (or config.yaml) is damaged.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); remove it to run the stage to its end again") from None
    if not isinstance(values, dict) or "checkpoint" not in values:
        raise UserError(f"{path} does not name a checkpoint; remove it to run the stage to its end again")
    if max_steps is None and (folder / "config.yaml").is_file():
        max_steps = _settings(folder / "config.yaml").stage.max_steps
    if max_steps is not None and values.get("steps", max_steps) < max_steps:
        return None
    # By its name alone: the folder may have been moved or copied, and older files have the path of those days.
    return {**values, "checkpoint": str(folder / "checkpoints" / Path(values["checkpoint"]).name)}


def read_metrics(folder: Path, **needed: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """One dictionary per logged step, in order; of a step that was run again after a crash, its last line.

    Args:
        needed: keys that a line must have besides the step, with the type of their values; others are left out.
    """
    steps = {line["step"]: line for line in read_lines(folder / "metrics.jsonl", step=int, **needed)}
    return [steps[s] for s in sorted(steps)]


def changed_settings(cfg: RunConfig, path: Any, free: Sequence[str], fixed: Sequence[str] = ()) -> list[str]:
    """`key was A, is now B` for each setting that differs from the file `path` and is `fixed`, or fits none of the
    patterns `free`."""
    if not path.is_file():
        return []
    before, now = flatten(to_dict(_settings(path))), flatten(to_dict(cfg))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return [
        f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
        for key in changed
        if key in fixed or not any(fnmatchcase(key, pattern) for pattern in free)
    ]


def refuse_changes(cfg: RunConfig, folder: Any, checkpoint: str, finished: bool = False) -> None:
    """A stage that was trained is gone on with, or taken as it is, only with the settings that it was trained with;
    max_steps may grow. To be called before config.yaml is written.

    Args:
        folder: the stage's, a `Path` or what stands for one on another machine.
        checkpoint: what it would go on from, for the message.

    Raises:
        UserError: names the settings and what to do.
    """
    path = folder / "config.yaml"
    free = (*FREE, *LAYOUT) if finished else (*FREE, *LAYOUT, *MOVED)
    if path.is_file() and cfg.stage.max_steps > _settings(path).stage.max_steps:
        free = (*free, "stage.max_steps")
    changes = changed_settings(cfg, path, free, () if finished else FIXED)
    if changes:
        more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
        raise UserError(
            f"{folder} was trained with other settings: {'; '.join(changes[:4])}{more}. Take the old settings, or "
            f"begin anew in another output_dir=... (with init_from={checkpoint} from the weights that are there)"
        )


def refuse_other_run(cfg: RunConfig) -> None:
    """`refuse_changes` for a stage that has a checkpoint among this machine's files. Says what will be different.

    Raises:
        UserError: as `refuse_changes`.
    """
    folder = stage_dir(cfg)
    path = folder / "config.yaml"
    found = manifest.finished(folder / "checkpoints")
    if not found or not path.is_file():
        return  # nothing to go on from, or nothing that says how it came about
    refuse_changes(cfg, folder, str(found[0]))
    before = _settings(path)
    if before.init_from != cfg.init_from:
        print(f"init_from={cfg.init_from} is not read: {cfg.stage.name} goes on from {found[0]}", flush=True)
    if before.stage.max_steps < cfg.stage.max_steps:
        told = f"stage.max_steps was {before.stage.max_steps}, is now {cfg.stage.max_steps}"
        print(f"{told}: from here on the learning rates follow the longer schedule", flush=True)


def _settings(path: Any) -> RunConfig:
    return read_yaml(read_text(path), str(path))


def note_error(folder: Path, report: dict[str, Any]) -> None:
    """Adds a report to the stage's errors.jsonl, for `molmo2 status`; a full disk must not hide the error itself."""
    try:
        append_line(folder / "errors.jsonl", report)
    except OSError:
        pass


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """The stage folder that a checkpoint lies in: the nearest one above it (or itself) with a config.yaml."""
    for folder in (checkpoint, *list(checkpoint.resolve().parents)[:3]):
        if (folder / "config.yaml").is_file():
            return folder
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder itself, or the final checkpoint of the stage (or the run's last finished stage) at `path`.

    Raises:
        UserError: there is no such folder, or nothing in it is finished.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint or run folder")
    for folder in (path, *(path / s for s in ("long", "sft", "pretrain"))):
        done = summary(folder)
        if done is not None:
            return Path(done["checkpoint"])
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path}: the stage is not finished (no summary.json); name one of its folders in checkpoints/")
    return path
