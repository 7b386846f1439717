"""summary.json of a stage: there once it is finished, and where its final checkpoint is; which checkpoint a folder that
a user names stands for."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError, plural, read_text
from molmo2_nemo.files import write_json
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.checkpoint_manifest import WEIGHTS, WEIGHTS_METADATA
from molmo2_nemo.rundir.config_file import read_config
from molmo2_nemo.rundir.lines import has_step
from molmo2_nemo.rundir.paths import CHECKPOINTS, CONFIG, EVALUATIONS, SUMMARY, VALIDATION, stage_dir
from molmo2_nemo.rundir.stages import stage_order
from molmo2_nemo.settings.run import RunConfig

NAMED = 4  # entries of a folder that an error lists
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


def figures_missing(cfg: RunConfig) -> list[str]:
    """Which figures of its last step a stage lacks: a signal came while they were made, or they were asked for later.
    In the words of its log."""
    made = {
        "scores": (cfg.evaluation.tasks, EVALUATIONS),
        "validation loss": (cfg.validation.sources, VALIDATION),
    }
    last, folder = cfg.stage.max_steps, stage_dir(cfg)
    return [name for name, (asked, file) in made.items() if asked and not has_step(folder / file, last)]


def resolve_checkpoint(path: str | Path, remarks: list[str] | None = None, *, finished: bool = False) -> Path:
    """The checkpoint that a folder stands for: itself, where it is one; of a stage, or of a run's last finished stage,
    the final one; where nothing is finished, and of checkpoints/, the last whole one.

    Args:
        remarks: gets a line about what was chosen, where the folder does not say it by itself.
        finished: refuse a stage or run that is not finished.

    Raises:
        UserError: there is no such folder, it is not a checkpoint and holds none, or none that is whole; modelopt has
            converted the model.
    """
    found = _found(Path(path), [] if remarks is None else remarks, finished)
    checkpoint_manifest.refuse_converted(found)
    return found


def _found(path: Path, remarks: list[str], finished: bool) -> Path:
    """The checkpoint that `resolve_checkpoint` is to find."""
    wrong = not_a_checkpoint(path)
    if wrong is not None:
        raise UserError(wrong)
    if _is_checkpoint(path):
        return _undamaged(path)
    begun = _begun(path)
    for number, folder in enumerate(begun):
        done = read_summary(folder)
        if done is not None:
            if number:
                remarks.append(f"{begun[0]} is not finished, so the last stage that is: {done['checkpoint']}")
            return _undamaged(Path(done["checkpoint"]))
    places = [folder / CHECKPOINTS for folder in begun] or [path]  # the latter: checkpoints/ itself
    for place in places:
        whole = checkpoint_manifest.newest_whole(place)
        if whole is None:
            continue
        if finished:
            raise UserError(f"{place.parent}: the stage is not finished; name one of its checkpoints, such as {whole}")
        newer = [step.name for step in _saved(place)[_saved(place).index(whole) + 1 :]]
        cut = f" ({', '.join(newer)}: not whole)" if newer else ""
        what = f"{place.parent} is not finished" if begun else f"{path} holds {plural(len(_saved(path)), 'checkpoint')}"
        remarks.append(f"{what}; its last whole checkpoint is used: {whole}{cut}")
        return whole
    for place in places:
        if saved := _saved(place):
            why = checkpoint_manifest.damage(saved[-1]) or ["it was not written to its end"]
            raise UserError(f"{place}: no checkpoint in it is whole; {saved[-1].name}: {why[0]}")
    raise UserError(f"{begun[0]}: the stage has not saved a checkpoint yet; molmo2 status shows how far it is")


def not_a_checkpoint(path: Path) -> str | None:
    """Why a path is neither a checkpoint nor a place that has some or will (a stage, a run, checkpoints/), with what
    to name or to do; None where it is one."""
    if path.exists() and not path.is_dir():
        return f"{path} is a file; name the folder of a checkpoint, a stage or a run"
    if not path.is_dir():
        hub = len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()
        more = "; download a model of the Hub first, then molmo2 convert import FOLDER CHECKPOINT" if hub else ""
        return f"{path}: no such checkpoint or run folder{more or _beside(path)}"
    if _is_checkpoint(path) or _begun(path) or (path.name == CHECKPOINTS and _saved(path)):
        return None
    if (path / "config.json").is_file() and any(path.glob("*.safetensors*")):
        return (
            f"{path} is a model in Hugging Face format; make a checkpoint of it: "
            f"molmo2 convert import {path} CHECKPOINT"
        )
    there = sorted(entry.name for entry in path.iterdir())
    held = f"it holds {', '.join(there[:NAMED])}{', ...' if len(there) > NAMED else ''}" if there else "it is empty"
    return f"{path} is not a checkpoint: {held}; a checkpoint has {WEIGHTS}/, a stage {CHECKPOINTS}/, a run its stages"


def _beside(path: Path) -> str:
    """A folder of nearly that name in the same place, as a question; "" if there is none."""
    there = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.75)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _is_checkpoint(path: Path) -> bool:
    """Whether it looks like one, or like the folder of weights in one."""
    return (path / WEIGHTS).is_dir() or (path / WEIGHTS_METADATA).is_file()


def _begun(path: Path) -> list[Path]:
    """Folders of stages: `path` itself, or those of a run, the last one first."""
    marks = (SUMMARY, CONFIG, CHECKPOINTS)
    if any((path / mark).exists() for mark in marks):
        return [path]
    names = sorted({found.parent.name for mark in marks for found in path.glob(f"*/{mark}")})
    return [path / name for name in reversed(stage_order(path, names)) if name in names]


def _saved(place: Path) -> list[Path]:
    """The folders in checkpoints/ that are named like one, whole or not, the newest last."""
    named = (step for step in place.glob(f"{checkpoint_manifest.STEP}*") if step.is_dir())
    return sorted(named, key=lambda step: (len(step.name), step.name))


def _undamaged(checkpoint: Path) -> Path:
    """A checkpoint whose files have the names and sizes of its manifest; without a manifest, which an imported one has
    not, it is taken as it is.

    Raises:
        UserError: it was not written to its end, a file is missing or cut, or it is gone.
    """
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint.parent.parent / SUMMARY} names the checkpoint {checkpoint}, which is gone")
    unfinished = checkpoint.with_name(checkpoint.name + checkpoint_manifest.UNFINISHED).exists()
    listed = (checkpoint / checkpoint_manifest.MANIFEST).exists()
    wrong = checkpoint_manifest.damage(checkpoint) if listed else []
    wrong = ["it was not written to its end"] if unfinished else wrong
    if not wrong:
        return checkpoint
    whole = checkpoint_manifest.newest_whole(checkpoint.parent)
    raise UserError(f"{checkpoint} is damaged: {wrong[0]}{'' if whole is None else f'; {whole} is whole'}")
