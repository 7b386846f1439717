"""summary.json of a stage: there once it is finished, and where its final checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError, read_text
from molmo2_nemo.files import write_json
from molmo2_nemo.rundir.config_file import read_config
from molmo2_nemo.rundir.paths import CHECKPOINTS, CONFIG, SUMMARY
from molmo2_nemo.settings.compose import STAGES

# The line of summary.json that counts the steps done, for sed: a job's script has to find it without Python.
STEPS_LINE = r'^ "steps": \([0-9]*\),*$'


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, whole or not at all.

    Args:
        folder: the stage's.
        summary: with "steps" and "checkpoint". Each key gets a line of its own, indented by one blank, and all that is
            inside a value is indented by more: `STEPS_LINE` finds one line and no other.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(folder / SUMMARY, summary, indent=1)


def read_summary(folder: Any, max_steps: int | None = None) -> dict[str, Any] | None:
    """The summary of a finished stage, with its checkpoint as a path; None while it is not finished.

    A stage is finished when its summary counts as many steps as it is to have.

    Args:
        folder: the stage's, a `Path` or what stands for one on another machine.
        max_steps: how many it is to have; default: what its config.yaml says.

    Raises:
        UserError: summary.json (or config.yaml) is damaged.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        values = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); remove it to run the stage to its end again") from None
    if not isinstance(values, dict) or "checkpoint" not in values:
        raise UserError(f"{path} does not name a checkpoint; remove it to run the stage to its end again")
    if max_steps is None and (config := read_config(folder / CONFIG)) is not None:
        max_steps = config.stage.max_steps
    if max_steps is not None and values.get("steps", max_steps) < max_steps:
        return None
    # By its name alone: the folder may have been moved or copied, and older files have an absolute path.
    return {**values, "checkpoint": str(folder / CHECKPOINTS / Path(values["checkpoint"]).name)}


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder itself, or the final checkpoint of the stage (or the run's last finished stage) at `path`.

    Raises:
        UserError: there is no such folder, nothing in it is finished, or it is something else: a folder of checkpoints,
            a model in Hugging Face format.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint or run folder")
    for folder in (path, *(path / stage for stage in reversed(STAGES))):
        done = read_summary(folder)
        if done is not None:
            return Path(done["checkpoint"])
    if (path / CHECKPOINTS).is_dir():
        raise UserError(f"{path}: the stage is not finished (no {SUMMARY}); name one of its folders in {CHECKPOINTS}/")
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        raise UserError(
            f"{path} is a model in Hugging Face format; make a checkpoint of it: "
            f"molmo2 convert import {path} CHECKPOINT"
        )
    if path.name == CHECKPOINTS and (steps := list(path.glob("step=*"))):
        newest = max(steps, key=lambda step: (len(step.name), step.name))
        raise UserError(f"{path} holds {len(steps)} checkpoints; name one of them, such as {newest}")
    return path
