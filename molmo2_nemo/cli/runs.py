"""Reading a run's folder: `<output_dir>/<stage>/` with config.yaml, metrics.jsonl and, when finished, summary.json."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo2_nemo.config import RunConfig
from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.schema import flatten, read_yaml, to_dict, to_yaml

# Settings that may differ between the first and a later call without making the finished work another one.
FREE = (
    *("output_dir", "init_from", "save_every", "log_every", "data.num_workers", "data.prefetch"),
    *("cluster.", "checkpoint.", "log.", "memory.", "validation."),
)


def stage_dir(cfg: RunConfig) -> Path:
    return Path(cfg.output_dir) / cfg.stage.name


def write_config(cfg: RunConfig) -> Path:
    """Writes the resolved configuration where the run keeps it."""
    folder = stage_dir(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    part = path.with_suffix(".yaml.part")
    part.write_text(to_yaml(cfg))
    part.replace(path)
    return path


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keeps a second run out of the folder while this one lasts; the system lifts the lock of a killed process.

    Raises:
        UserError: another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the folder: NeMo's logger moves the files that it finds inside.
    with open(folder.parent / f".{folder.name}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is at work in {folder}; wait for it, stop it, or take another output_dir"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def summary(folder: Any) -> dict[str, Any] | None:
    """What a finished stage says of itself; None while it is not finished.

    Raises:
        UserError: summary.json is damaged.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); remove it to run the stage to its end again") from None
    if not isinstance(values, dict) or "checkpoint" not in values:
        raise UserError(f"{path} does not name a checkpoint; remove it to run the stage to its end again")
    return values


def metrics(folder: Path) -> list[dict[str, Any]]:
    """One dictionary per logged step, in order; of a step that was run again after a crash, its last line."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            steps[int(row["step"])] = row
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            continue  # the line a crash cut
    return [steps[s] for s in sorted(steps)]


def changed_settings(cfg: RunConfig, path: Any) -> list[str]:
    """`key was A, is now B` for each setting that differs from the file `path` and matters for the result."""
    if not path.is_file():
        return []
    before, now = flatten(to_dict(read_yaml(path.read_text(), str(path)))), flatten(to_dict(cfg))
    return [
        f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not any(key == f or (f[-1] == "." and key.startswith(f)) for f in FREE)
    ]


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
