"""Options that several verbs have, and checks of their values before anything expensive begins."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from molmo2_nemo.errors import UserError, blocking_file

NOT_DRY = "--dry-run prints sbatch scripts: it needs cluster=slurm; for a local run, --cfg job prints its configuration"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every verb that composes a configuration."""
    parser.add_argument("--cfg", choices=["job"], help="print the configuration that would run, and stop")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own configurations, laid out like conf/")


def add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verbs that submit jobs with cluster=slurm."""
    parser.add_argument("--dry-run", action="store_true", help="cluster=slurm: print the sbatch scripts, and stop")


def check_numbers(args: argparse.Namespace, least: Mapping[str, float]) -> None:
    """Refuses numbers below the least one allowed; `least` maps names as in `args` to it. Options not given are None.

    Raises:
        UserError: names the option.
    """
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {low}")


def check_folder(option: str, folder: Path) -> None:
    """Refuses an output folder that cannot be made, because it or one above it is a file.

    Raises:
        UserError: names the option and that file.
    """
    file = blocking_file(folder)
    if file is not None:
        raise UserError(f"{option} {folder}: {'it' if file == folder else file} is a file; name a folder")


def check_file(option: str, path: Path) -> None:
    """Refuses an output file that cannot be written: it is a folder, or there is none to put it into.

    Raises:
        UserError: names the option and what is in the way.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: it is a folder; name a file in it")
    file = blocking_file(path.parent)
    if file is not None:
        raise UserError(f"{option} {path}: {file} is a file, not a folder")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} {path}: it cannot be written there")
