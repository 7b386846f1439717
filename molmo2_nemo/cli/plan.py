"""What a stage needs on a cluster: memory per GPU, time, GPU-hours, and the layouts to choose from. Computes only: no
GPU, no data, no torch."""

from __future__ import annotations

import argparse
import json
from typing import Any

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
    parser.add_argument("--kernel", choices=("flex", "flash"), default="flex", help="whose attention rates to assume")
    parser.add_argument("--area", type=float, help="share of S x S that the mask allows, where you know it (0 to 1)")
    parser.add_argument("--json", action="store_true", help="numbers instead of tables")


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.errors import UserError
    from molmo2_nemo.model.config import preset, with_choices
    from molmo2_nemo.plan.hardware import parse_cluster
    from molmo2_nemo.plan.rates import KERNELS
    from molmo2_nemo.plan.search import search
    from molmo2_nemo.plan.workload import workload
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
    chosen = cfg.model
    model = with_choices(preset(chosen.preset), rope_scaling=chosen.rope_scaling, rope_factor=chosen.rope_factor)
    plan = search(cfg, model, workload(cfg, args.area), cluster, KERNELS[args.kernel])
    if args.json:
        print(json.dumps(numbers(plan), indent=1))
        return 0
    from rich.console import Console

    from molmo2_nemo.plan.table import render

    console = Console(highlight=False)
    for part in render(cfg, model, plan):
        console.print(part)
    return 0


def numbers(plan: Any) -> dict[str, Any]:
    """The plan as JSON values: seconds, GiB, GPU-hours."""
    from molmo2_nemo.plan.memory import GIB

    def one(candidate: Any) -> dict[str, Any]:
        step = candidate.step
        return {
            "layout": candidate.layout.name,
            "settings": candidate.layout.settings,
            "memory_gib": {name: value / GIB for name, value in candidate.memory.parts().items()},
            "step_seconds": step.parts(),
            "seconds": step.seconds,
            "mfu": step.mfu(plan.cluster),
            "gpu_hours": step.gpu_hours(plan.cluster, plan.work.steps),
            "link_bytes": step.link_bytes,
            "network_bytes": step.network_bytes,
        }

    return {
        "cluster": str(plan.cluster),
        "best": [one(c) for c in plan.best],
        "configured": one(plan.configured) if plan.configured else None,
        "others": [one(c) | {"why_not": why} for c, why in plan.others],
    }
