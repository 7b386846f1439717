"""config.yaml of a stage: the settings that it runs with, or was last trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molmo2_nemo.errors import read_text
from molmo2_nemo.files import write_text
from molmo2_nemo.rundir.paths import CONFIG, stage_dir
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import read_yaml, to_yaml


def write_config(cfg: RunConfig) -> Path:
    """Write the resolved settings to the stage's folder, which is made if need be; gives their path.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path = stage_dir(cfg) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_yaml(cfg))
    return path


def read_config(path: Any) -> RunConfig | None:
    """The settings in a file that `write_config` wrote, also an older version of it; None where there is no file.

    Args:
        path: the file's, a `Path` or what stands for one on another machine.

    Raises:
        UserError: the file is damaged, or is no configuration.
    """
    return read_yaml(read_text(path), str(path)) if path.is_file() else None


def truncated_of_checkpoint(checkpoint: Path) -> str:
    """`data.image.truncated` of the run that a checkpoint belongs to; the default where it has no config.yaml.

    Raises:
        UserError: the file is damaged.
    """
    run = run_of_checkpoint(checkpoint)
    cfg = read_config(run / CONFIG) if run is not None else None
    return (cfg or RunConfig()).data.image.truncated


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """The stage folder that a checkpoint lies in: the nearest one above it (or itself) with a config.yaml."""
    folders = (checkpoint, *list(checkpoint.resolve().parents)[:3])
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)
