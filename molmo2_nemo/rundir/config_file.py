"""config.yaml of a stage: the settings that it runs with, or was last trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molmo2_nemo.data.config import TextFormatConfig
from molmo2_nemo.data.wordings import save, wordings_of
from molmo2_nemo.errors import read_text
from molmo2_nemo.files import write_text
from molmo2_nemo.rundir.paths import CONFIG, stage_dir, templates_copy
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import read_yaml, to_yaml


def write_config(cfg: RunConfig) -> Path:
    """Write the resolved settings to the stage's folder, which is made if need be, and a copy of the wordings that they
    name to the run's; gives the path of the settings.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path = stage_dir(cfg) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    _keep_templates(cfg)
    write_text(path, to_yaml(cfg))
    return path


def _keep_templates(cfg: RunConfig) -> None:
    text = cfg.data.text
    if text.templates is None or text.templates_sha256 is None:
        return
    copy = templates_copy(Path(cfg.output_dir), text.templates_sha256)
    if not copy.exists():
        save(wordings_of(text), copy)


def use_kept_templates(text: TextFormatConfig, run: Path) -> None:
    """Let settings name the copy of their wordings in the run's folder, where there is one: the file itself may be
    changed while the run lasts, or be gone when its model is asked.

    Args:
        run: the folder that the stages lie in.
    """
    if text.templates is not None and text.templates_sha256 is not None:
        copy = templates_copy(run, text.templates_sha256)
        if copy.is_file():
            text.templates = str(copy)


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
