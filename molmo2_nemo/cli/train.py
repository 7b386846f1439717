"""Run one stage. Settings are written key=value; a group takes one of the files in conf/, a dotted key any value."""

from __future__ import annotations

import argparse

from molmo2_nemo.errors import INTERRUPTED

EXAMPLES = """\
examples:
  molmo2 train recipe=tiny stage=sft parallel.tensor=2 stage.max_steps=20
  molmo2 train recipe=8b stage=long init_from=runs/8b/sft --cfg job
  molmo2 train --config-dir my_conf recipe=tiny data=my_data
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example stage=sft")
    add_config_arguments(parser)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every verb which composes a configuration has."""
    parser.add_argument("--cfg", choices=["job"], help="print the configuration that would run, and stop")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own configurations, laid out like conf/")


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.cli.launch import launch
    from molmo2_nemo.cli.runs import resolve_checkpoint, stage_dir
    from molmo2_nemo.settings.compose import compose
    from molmo2_nemo.settings.schema import to_yaml

    cfg = compose(args.overrides, args.config_dir)
    if args.cfg:
        print(to_yaml(cfg), end="")
        return 0
    if cfg.init_from is not None:
        cfg.init_from = str(resolve_checkpoint(cfg.init_from))
    code = launch(cfg)
    if code == INTERRUPTED:
        print(f"interrupted; the same command goes on from the last checkpoint in {stage_dir(cfg)}")
    return code
