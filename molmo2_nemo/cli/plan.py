"""What a stage needs on a cluster: memory per GPU, time, GPU-hours, and the layouts to choose from. Computes only: no
GPU, no data, no torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from molmo2_nemo.cost.efficiency import EFFICIENCIES
from molmo2_nemo.errors import UserError

if TYPE_CHECKING:
    from molmo2_nemo.cost.hardware import Cluster
    from molmo2_nemo.settings.run import RunConfig

HARDWARE = ("cluster=", "nodes=")
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
        "l40sx8; default: the GPUs that the settings' own layout fits, else h100x8) and nodes=N",
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


def planned_cluster(cfg: RunConfig, hardware: list[str]) -> tuple[Cluster, str]:
    """The cluster that `cluster=` and `nodes=` name, or one for the run's own layout; and why it, where not named.

    Raises:
        UserError: named twice, or not as expected.
    """
    from molmo2_nemo.cost.hardware import parse_cluster
    from molmo2_nemo.plan.words import own_cluster

    asked = dict(item.split("=", 1) for item in hardware)
    if len(asked) < len(hardware):
        raise UserError(f"{' '.join(hardware)}: a plan is for one cluster; name each of cluster= and nodes= once")
    try:
        nodes = int(asked.get("nodes", "1"))
    except ValueError:
        raise UserError(f"nodes={asked['nodes']}: expected a whole number") from None
    if "cluster" in asked:
        return parse_cluster(asked["cluster"], nodes), ""
    own = own_cluster(cfg) if cfg.cluster.kind == "local" else None
    if own is None or "nodes" in asked:
        return parse_cluster("h100x8", nodes), "as nothing else was named"
    return own, "the smallest usual GPUs with the memory for the settings' own layout"


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.cost.efficiency import EFFICIENCIES
    from molmo2_nemo.cost.workload import workload
    from molmo2_nemo.plan.checks import check_kernel, check_settings
    from molmo2_nemo.plan.command import FREE, lines, train_command
    from molmo2_nemo.plan.numbers import numbers
    from molmo2_nemo.plan.remarks import remarks
    from molmo2_nemo.plan.search import efficiency_of, search
    from molmo2_nemo.plan.words import model_of
    from molmo2_nemo.settings.compose import compose

    hardware = [item for item in args.overrides if item.startswith(HARDWARE)]
    rest = [item for item in args.overrides if not item.startswith(HARDWARE)]
    cfg = compose(rest, args.config_dir)
    cluster, why = planned_cluster(cfg, hardware)
    if args.area is not None and not 0 < args.area <= 1:
        raise UserError(f"--area {args.area}: expected a share of S x S, above 0 and at most 1")
    check_settings(cfg, rest)
    check_kernel(args.kernel, cluster)
    model = model_of(cfg)
    kernel, efficiency = efficiency_of(cfg, model)
    if args.kernel != "auto":
        kernel, efficiency = args.kernel, EFFICIENCIES[args.kernel]
    plan = replace(search(cfg, model, workload(cfg, args.area), cluster, efficiency), why_cluster=why)
    said = list(remarks(cfg, plan, rest, cluster_given=not why))
    command = train_command(rest, cfg, cluster, plan.best[0].layout, args.config_dir)
    if args.json:
        print(json.dumps(numbers(plan, model) | {"kernel": kernel, "command": command, "remarks": said}, indent=1))
        return 0
    from rich.console import Console

    from molmo2_nemo.plan.table import render

    console = Console(highlight=False, markup=False)
    for part in render(cfg, model, plan):
        console.print(part)
    for remark in said:
        console.print(f"\n{remark}.")
    print("\nto train with this plan:", *lines(command), sep="\n")
    console.print(f"\nA plan chooses {', '.join(FREE)}; all else is as set.")
    console.print(
        f"Predicted with {kernel} attention from stated shares of peak\n"
        "(molmo2_nemo/cost/efficiency.py), not measured on a cluster."
    )
    return 0
