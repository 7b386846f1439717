"""Run one stage. Settings are written key=value; a group takes the name of a file in conf/, a dotted key any value."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from molmo2_nemo.cli.options import (
    NOT_DRY,
    add_config_arguments,
    add_multirun_arguments,
    add_submit_arguments,
    check_config_arguments,
    shown_instead,
)
from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.run import RunConfig

EXAMPLES = """\
examples:
  molmo2 train recipe=tiny stage=sft parallel.tensor=2 stage.max_steps=20
  molmo2 train recipe=8b stage=long init_from=runs/8b/sft --cfg job
  molmo2 train --config-dir my_conf recipe=tiny data=my_data
  molmo2 train --config runs/tiny/sft/config.yaml          # exactly what a run's folder holds
  molmo2 train recipe=8b stage=sft init_from=checkpoints/8b cluster=slurm --dry-run
  molmo2 train --multirun recipe=tiny output_dir=runs/rates stage.optim.llm.lr=1e-4,1e-3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example stage=sft")
    add_config_arguments(parser)
    add_submit_arguments(parser)
    add_multirun_arguments(parser)
    parser.add_argument("--config", metavar="FILE", help="a resolved configuration, in place of settings")


def run(args: argparse.Namespace) -> int:
    check_config_arguments(args)
    if args.multirun:
        return sweep(args)
    if args.config is None and shown_instead(args, {"": args.overrides}):
        return 0
    cfg = configuration(args)
    if args.cfg or args.info:
        from molmo2_nemo.settings.hydra_view import part_of
        from molmo2_nemo.settings.schema import to_dict

        if args.cfg != "job":
            raise UserError(f"--config {args.config} was not composed by Hydra: only --cfg job shows something of it")
        print(part_of(to_dict(cfg), args.package), end="")
        return 0
    return run_or_submit([cfg], args.dry_run)


def run_or_submit(configs: Sequence[RunConfig], dry_run: bool) -> int:
    """Runs one stage here, or submits it; returns the exit code."""
    from molmo2_nemo.launch.local import launch
    from molmo2_nemo.launch.pipeline import submit_stages
    from molmo2_nemo.launch.reports import show_how_to_resume, show_next
    from molmo2_nemo.launch.slurm.step import in_step
    from molmo2_nemo.launch.worker import leave
    from molmo2_nemo.rundir.paths import stage_dir

    (cfg,) = configs
    if cfg.cluster.kind == "slurm" and not in_step(os.environ):
        return submit_stages([cfg], dry_run=dry_run)
    if dry_run:
        raise UserError(NOT_DRY)
    code = launch(cfg)
    show_how_to_resume(code, stage_dir(cfg))
    if code == 0:
        show_next(cfg)
    if code and "RANK" in os.environ:
        leave(code)
    return code


def sweep(args: argparse.Namespace) -> int:
    """`--multirun`: a run for each combination of values."""
    from molmo2_nemo.launch.multirun import run_sweep
    from molmo2_nemo.settings.compose import compose
    from molmo2_nemo.settings.multirun import read_sweep

    if args.config is not None:
        raise UserError(f"--config {args.config} is the whole configuration of one run; leave out --multirun")
    found = read_sweep(args.overrides, args.config_dir)
    if shown_instead(args, {" ".join(job): [*found.fixed, *job] for job in found.jobs}):
        return 0
    return run_sweep(
        found,
        lambda overrides: [compose(overrides, args.config_dir, args.config_name)],
        lambda configs: run_or_submit(configs, args.dry_run),
        dry_run=args.dry_run,
    )


def configuration(args: argparse.Namespace) -> RunConfig:
    """The run that the command line describes.

    Raises:
        UserError: settings that `compose` or `load_yaml` refuses, or both --config and settings.
    """
    from molmo2_nemo.settings.compose import compose
    from molmo2_nemo.settings.schema import load_yaml

    if args.config is None:
        return compose(args.overrides, args.config_dir, args.config_name)
    if args.overrides or args.config_dir or args.config_name:
        raise UserError(f"--config {args.config} is the whole configuration; it takes no settings and no --config-dir")
    return load_yaml(args.config)
