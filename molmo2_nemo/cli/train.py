"""Run one stage. Settings are written key=value; a group takes the name of a file in conf/, a dotted key any value."""

from __future__ import annotations

import argparse
import os

from molmo2_nemo.cli.options import NOT_DRY, add_config_arguments, add_submit_arguments
from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.run import RunConfig

EXAMPLES = """\
examples:
  molmo2 train recipe=tiny stage=sft parallel.tensor=2 stage.max_steps=20
  molmo2 train recipe=8b stage=long init_from=runs/8b/sft --cfg job
  molmo2 train --config-dir my_conf recipe=tiny data=my_data
  molmo2 train --config runs/tiny/sft/config.yaml          # exactly what a run's folder holds
  molmo2 train recipe=8b stage=sft init_from=checkpoints/8b cluster=slurm --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example stage=sft")
    add_config_arguments(parser)
    add_submit_arguments(parser)
    parser.add_argument("--config", metavar="FILE", help="a resolved configuration, in place of settings")


def run(args: argparse.Namespace) -> int:
    cfg = configuration(args)
    if args.cfg:
        from molmo2_nemo.settings.schema import to_yaml

        print(to_yaml(cfg), end="")
        return 0
    from molmo2_nemo.launch.local import launch
    from molmo2_nemo.launch.pipeline import submit_stages
    from molmo2_nemo.launch.reports import show_how_to_resume
    from molmo2_nemo.launch.slurm.step import in_step
    from molmo2_nemo.launch.worker import leave
    from molmo2_nemo.rundir.paths import stage_dir

    if cfg.cluster.kind == "slurm" and not in_step(os.environ):
        return submit_stages([cfg], dry_run=args.dry_run)
    if args.dry_run:
        raise UserError(NOT_DRY)
    code = launch(cfg)
    show_how_to_resume(code, stage_dir(cfg))
    if code and "RANK" in os.environ:
        leave(code)
    return code


def configuration(args: argparse.Namespace) -> RunConfig:
    """The run that the command line describes.

    Raises:
        UserError: settings that `compose` or `load_yaml` refuses, or both --config and settings.
    """
    from molmo2_nemo.settings.compose import compose
    from molmo2_nemo.settings.schema import load_yaml

    if args.config is None:
        return compose(args.overrides, args.config_dir)
    if args.overrides or args.config_dir:
        raise UserError(f"--config {args.config} is the whole configuration; it takes no settings and no --config-dir")
    return load_yaml(args.config)
