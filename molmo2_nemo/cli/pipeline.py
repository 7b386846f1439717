"""Run the stages that the recipe lists (stages: [pretrain, sft, long]), each from the weights of the one before.
Finished stages are skipped and an unfinished one resumes from its last checkpoint: after an interruption, run the same
command again.

With cluster=slurm the stages become jobs that wait for one another. The same command submits what is missing and
recognises jobs that wait or run already; see docs/slurm.md.

A setting holds for every stage, or for one when its name stands before a colon: sft:stage.max_steps=100.
stages=[sft,long] runs a part of them, or others: any that have a file in conf/stage/ or in stage/ of --config-dir."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from molmo2_nemo.cli.options import (
    NOT_DRY,
    add_config_arguments,
    add_multirun_arguments,
    add_submit_arguments,
    check_config_arguments,
    shown_instead,
)
from molmo2_nemo.errors import UserError

if TYPE_CHECKING:
    from molmo2_nemo.settings.run import RunConfig

EXAMPLES = """\
examples:
  molmo2 pipeline recipe=tiny
  molmo2 pipeline recipe=tiny output_dir=runs/try2 pretrain:stage.max_steps=100
  molmo2 pipeline recipe=tiny stages=[pretrain,sft]
  molmo2 pipeline recipe=8b cluster=slurm pretrain:init_from=checkpoints/8b-start --dry-run
  molmo2 pipeline --multirun recipe=tiny output_dir=runs/steps sft:stage.max_steps=20,40
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]KEY=VALUE", help="settings, for example recipe=tiny")
    add_config_arguments(parser)
    add_submit_arguments(parser)
    add_multirun_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.launch.pipeline import compose_stages, overrides_of_stages

    check_config_arguments(args)
    where = (args.config_dir, args.config_name)
    if args.multirun:
        return sweep(args)
    if args.cfg == "job" and args.package is None:  # with init_from, and remarks on a part of the stages
        from molmo2_nemo.settings.schema import to_yaml

        print("---\n".join(to_yaml(cfg) for cfg in compose_stages(args.overrides, *where)), end="")
        return 0
    if shown_instead(args, overrides_of_stages(args.overrides, *where)[1]):
        return 0
    return run_or_submit(compose_stages(args.overrides, *where), args.dry_run)


def run_or_submit(configs: Sequence[RunConfig], dry_run: bool) -> int:
    """Runs the stages here, or submits them; returns the exit code."""
    from molmo2_nemo.launch.pipeline import run_stages, submit_stages

    if any(cfg.cluster.kind == "slurm" for cfg in configs):
        return submit_stages(configs, dry_run=dry_run)
    if dry_run:
        raise UserError(NOT_DRY)
    code = run_stages(configs)
    if code == 0:
        from molmo2_nemo.launch.reports import show_next

        show_next(configs[-1])
    return code


def sweep(args: argparse.Namespace) -> int:
    """`--multirun`: the stages once for each combination of values."""
    from molmo2_nemo.launch.multirun import run_sweep
    from molmo2_nemo.launch.pipeline import compose_stages, overrides_of_stages
    from molmo2_nemo.settings.multirun import read_sweep

    where = (args.config_dir, args.config_name)
    found = read_sweep(args.overrides, args.config_dir)
    if args.cfg or args.info:
        shown: dict[str, Sequence[str]] = {}
        for job in found.jobs:
            stages = overrides_of_stages([*found.fixed, *job], *where)[1]
            shown |= {f"{name} {' '.join(job)}": own for name, own in stages.items()}
        shown_instead(args, shown)
        return 0
    return run_sweep(
        found,
        lambda overrides: compose_stages(overrides, *where),
        lambda configs: run_or_submit(configs, args.dry_run),
        dry_run=args.dry_run,
    )
