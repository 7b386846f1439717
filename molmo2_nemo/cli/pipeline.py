"""Run the three stages, each from the weights of the one before. Finished stages are skipped and an unfinished one
resumes from its last checkpoint: after an interruption, run the same command again.

With cluster=slurm the stages become jobs that wait for one another. The same command submits what is missing and
recognises jobs that wait or run already; see docs/slurm.md.

A setting holds for every stage, or for one when its name stands before a colon: sft:stage.max_steps=100."""

from __future__ import annotations

import argparse

from molmo2_nemo.cli.options import NOT_DRY, add_config_arguments, add_submit_arguments
from molmo2_nemo.errors import UserError

EXAMPLES = """\
examples:
  molmo2 pipeline recipe=tiny
  molmo2 pipeline recipe=tiny output_dir=runs/try2 pretrain:stage.max_steps=100
  molmo2 pipeline recipe=8b cluster=slurm pretrain:init_from=checkpoints/8b-start --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]KEY=VALUE", help="settings, for example recipe=tiny")
    add_config_arguments(parser)
    add_submit_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.launch.pipeline import compose_stages, run_stages, submit_stages

    configs = compose_stages(args.overrides, args.config_dir)
    if args.cfg:
        from molmo2_nemo.settings.schema import to_yaml

        print("---\n".join(to_yaml(cfg) for cfg in configs), end="")
        return 0
    if any(cfg.cluster.kind == "slurm" for cfg in configs):
        return submit_stages(configs, dry_run=args.dry_run)
    if args.dry_run:
        raise UserError(NOT_DRY)
    return run_stages(configs)
