"""What a stage needs on a cluster: memory per GPU, time, GPU-hours, and the layouts to choose from. Computes only: no
GPU, no data, no torch."""

from __future__ import annotations

import argparse
import json

from molmo2_nemo.cost.efficiency import EFFICIENCIES

EXAMPLES = """\
examples:
  molmo2 plan recipe=8b stage=long cluster=h100x8 nodes=16
  molmo2 plan recipe=4b stage=sft cluster=h200x8             # nodes=1
  molmo2 plan recipe=8b stage=long cluster=h100x8 nodes=16 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings, for example recipe=8b stage=long; besides them cluster=GPUxN (h100x8, h200x8, a100x8, b200x8, "
        "l40sx8) and nodes=N",
    )
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own configurations, laid out like conf/")
    parser.add_argument(
        "--kernel",
        choices=("auto", *EFFICIENCIES),
        default="auto",
        help="attention kernel whose speed is assumed; auto: the one model.attention picks on GPUs, where flash is "
        "FlashAttention-2 (flash3 where FlashAttention-3 is installed)",
    )
    parser.add_argument("--area", type=float, help="share of S x S that the mask allows, where you know it (0 to 1)")
    parser.add_argument("--json", action="store_true", help="numbers instead of tables")


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.cost.efficiency import EFFICIENCIES
    from molmo2_nemo.cost.hardware import parse_cluster
    from molmo2_nemo.cost.workload import workload
    from molmo2_nemo.errors import UserError
    from molmo2_nemo.model.config import preset, with_options
    from molmo2_nemo.plan.checks import check_kernel, check_settings
    from molmo2_nemo.plan.command import lines, train_command
    from molmo2_nemo.plan.numbers import numbers
    from molmo2_nemo.plan.search import efficiency_of, search
    from molmo2_nemo.settings.compose import compose

    asked = dict(item.split("=", 1) for item in args.overrides if item.startswith(("cluster=", "nodes=")))
    rest = [item for item in args.overrides if not item.startswith(("cluster=", "nodes="))]
    cfg = compose(rest, args.config_dir)
    try:
        nodes = int(asked.get("nodes", "1"))
    except ValueError:
        raise UserError(f"nodes={asked['nodes']}: expected a whole number") from None
    cluster = parse_cluster(asked.get("cluster", "h100x8"), nodes)
    if args.area is not None and not 0 < args.area <= 1:
        raise UserError(f"--area {args.area}: expected a share of S x S, above 0 and at most 1")
    check_settings(cfg, rest)
    check_kernel(args.kernel, cluster)
    chosen = cfg.model
    model = with_options(preset(chosen.preset), rope_scaling=chosen.rope_scaling, rope_factor=chosen.rope_factor)
    kernel, efficiency = efficiency_of(cfg, model)
    if args.kernel != "auto":
        kernel, efficiency = args.kernel, EFFICIENCIES[args.kernel]
    plan = search(cfg, model, workload(cfg, args.area), cluster, efficiency)
    command = train_command(rest, cfg, cluster, plan.best[0].layout, args.config_dir)
    if args.json:
        print(json.dumps(numbers(plan, model) | {"kernel": kernel, "command": command}, indent=1))
        return 0
    from rich.console import Console

    from molmo2_nemo.plan.table import render

    console = Console(highlight=False, markup=False)
    for part in render(cfg, model, plan):
        console.print(part)
    print("\nto train with this plan:", *lines(command), sep="\n")
    console.print(
        f"\nPredicted with {kernel} attention from stated shares of peak\n"
        "(molmo2_nemo/cost/efficiency.py), not measured on a cluster."
    )
    return 0
