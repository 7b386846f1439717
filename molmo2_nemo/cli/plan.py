"""What a stage needs on a cluster: memory per GPU, time, GPU-hours, and the layouts to choose from. Computes only: no
GPU, no data, no torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from molmo2_nemo.cli.options import add_config_dir_arguments, check_numbers
from molmo2_nemo.cost.efficiency import EFFICIENCIES, Efficiency
from molmo2_nemo.errors import UserError, plural, writing

if TYPE_CHECKING:
    from molmo2_nemo.cost.hardware import Cluster
    from molmo2_nemo.settings.run import RunConfig

DYNAMIC = "parallel.dynamic_context=true, all crops on any rank by memory.vision_chunk"
HARDWARE = ("cluster=", "nodes=")
EXAMPLES = """\
examples:
  molmo2 plan recipe=8b stage=long cluster=h100x8 nodes=16
  molmo2 plan recipe=4b stage=sft cluster=h200x8             # nodes=1
  molmo2 plan recipe=8b stage=long cluster=h100x8 nodes=16 --json
  molmo2 plan recipe=8b stage=sft data.root=/data/shards --record packs.jsonl    # reads the shards; minutes
  molmo2 plan recipe=8b stage=sft cluster=h100x8 nodes=16 --packs packs.jsonl    # of those packs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings, for example recipe=8b stage=long; besides them cluster=GPUxN (h100x8, h200x8, a100x8, b200x8, "
        "l40sx8; default: the GPUs that the settings' own layout fits, else h100x8) and nodes=N",
    )
    add_config_dir_arguments(parser)
    parser.add_argument(
        "--kernel",
        choices=("auto", *EFFICIENCIES),
        default="auto",
        help="attention kernel whose speed is assumed; auto: the one model.attention picks on GPUs, where flash is "
        "FlashAttention-2 (flash3 where FlashAttention-3 is installed)",
    )
    parser.add_argument("--area", type=float, help="share of S x S that the mask allows, where you know it (0 to 1)")
    parser.add_argument(
        "--packs",
        metavar="FILE",
        help="plan for the packs that --record wrote; compares dynamic context groups on them",
    )
    parser.add_argument(
        "--record", metavar="FILE", help="read the run's shards, write what its first packs are made of, and stop"
    )
    parser.add_argument("--count", type=int, metavar="N", help="packs that --record takes (default: those of a step)")
    parser.add_argument(
        "--rates",
        metavar="FILE",
        help='measured rates in place of assumed ones, as JSON: {"source": "where from", "matrix": 0.6, ...}, by the '
        "names of molmo2_nemo/cost/efficiency.py",
    )
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


def read_rates(path: str, assumed: Efficiency) -> tuple[str, Efficiency]:
    """Where measured rates are from, and `assumed` with them.

    Raises:
        UserError: no JSON object of numbers there, or an unknown name.
    """
    from molmo2_nemo.cost.efficiency import measured

    try:
        rates = json.loads(Path(path).read_text())
        source = str(rates.pop("source", path))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--rates {path}: expected a JSON object of names and numbers ({error})") from None
    try:
        return source, measured(assumed, rates)
    except UserError as error:
        raise UserError(f"--rates {path}: {error}") from None


def record_packs(cfg: RunConfig, file: str, count: int | None, overrides: list[str]) -> int:
    """`--record`: what the run's first packs are made of."""
    from molmo2_nemo.plan import recording

    count = count or cfg.stage.global_batch_size
    with writing(Path(file)):
        head, packs = recording.record(cfg, count, overrides)
        recording.write(Path(file), head, packs)
    fill = sum(p.tokens for p in packs) / len(packs) / head["sequence_length"]
    crops = sum(p.crops for p in packs) / len(packs) / head["max_crops"]
    print(f"{file}: {plural(len(packs), 'pack')}, {fill:.1%} of their tokens and {crops:.1%} of their crops in use")
    return 0


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.cost.efficiency import EFFICIENCIES
    from molmo2_nemo.cost.workload import workload
    from molmo2_nemo.plan.checks import check_kernel, check_settings
    from molmo2_nemo.plan.command import FREE, lines, train_command
    from molmo2_nemo.plan.groups import simulate
    from molmo2_nemo.plan.numbers import numbers
    from molmo2_nemo.plan.recording import read
    from molmo2_nemo.plan.remarks import remarks
    from molmo2_nemo.plan.search import efficiency_of, search
    from molmo2_nemo.plan.words import model_of
    from molmo2_nemo.settings.compose import compose

    check_numbers(args, {"count": 1})
    if args.count is not None and args.record is None:
        raise UserError("--count belongs to --record")
    if args.packs is not None and args.area is not None:
        raise UserError("--area and --packs: a recording has the mask's share; leave one of them out")
    hardware = [item for item in args.overrides if item.startswith(HARDWARE)]
    rest = [item for item in args.overrides if not item.startswith(HARDWARE)]
    cfg = compose(rest, args.config_dir, args.config_name)
    if args.record is not None:
        return record_packs(cfg, args.record, args.count, rest)
    cluster, why = planned_cluster(cfg, hardware)
    if args.area is not None and not 0 < args.area <= 1:
        raise UserError(f"--area {args.area}: expected a share of S x S, above 0 and at most 1")
    check_settings(cfg, rest)
    check_kernel(args.kernel, cluster)
    model = model_of(cfg)
    kernel, efficiency = efficiency_of(cfg, model)
    if args.kernel != "auto":
        kernel, efficiency = args.kernel, EFFICIENCIES[args.kernel]
    source = None
    if args.rates is not None:
        source, efficiency = read_rates(args.rates, efficiency)
    work, groups = workload(cfg, args.area), None
    if args.packs is not None:
        packs = read(Path(args.packs))
        work, groups = packs.workload(cfg, work), simulate(cfg, model, packs, cluster, efficiency)
    plan = replace(search(cfg, model, work, cluster, efficiency), why_cluster=why)
    said = list(remarks(cfg, plan, rest, cluster_given=not why, counted=args.packs))
    said += [f"no groups of {size}" for size in groups.left_out] if groups else []
    command = train_command(rest, cfg, cluster, plan.best[0].layout, args.config_dir, args.config_name)
    if args.json:
        more = {"kernel": kernel, "rates": vars(efficiency), "command": command, "remarks": said}
        simulated = {"groups": vars(groups)} if groups else {}
        print(json.dumps(numbers(plan, model) | simulated | more, indent=1))
        return 0
    from rich.console import Console

    from molmo2_nemo.plan.table import groups_table, render

    console = Console(highlight=False, markup=False)
    for part in render(cfg, model, plan):
        console.print(part)
    if groups is not None and groups.seconds:
        console.print(groups_table(groups))
        steps = f"{groups.steps} recorded step" + ("s, on average" if groups.steps > 1 else "")
        console.print(f"{steps}; whole layers recomputed, gradients' exchange left out;\ndynamic ones by {DYNAMIC}")
    for remark in said:
        console.print(f"\n{remark}.")
    print("\nto train with this plan:", *lines(command), sep="\n")
    console.print(f"\nA plan chooses {', '.join(FREE)}; all else is as set.")
    shares = "(molmo2_nemo/cost/efficiency.py), not measured on a cluster."
    if source is not None:
        shares = f"(molmo2_nemo/cost/efficiency.py), those of {source} as measured."
    console.print(f"Predicted with {kernel} attention from stated shares of peak\n{shares}")
    return 0
