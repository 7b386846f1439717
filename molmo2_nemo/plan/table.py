"""A plan as tables that fit a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from molmo2_nemo.config import RunConfig
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.plan.memory import GIB
from molmo2_nemo.plan.published import HOURS, published_gpu_hours, published_step
from molmo2_nemo.plan.search import Plan
from molmo2_nemo.plan.sizes import parameters

OTHERS = 8  # losing layouts that are shown
WHAT = {
    "weights": "weights, bf16",
    "gradients": "gradients, fp32",
    "optimizer": "masters and moments, fp32, sharded",
    "decoder": "decoder activations",
    "vision": "encoder and connector activations",
    "head": "logits of a chunk, head's gradient",
    "exchange": "what groups send and receive",
    "runtime": "CUDA, NCCL, fragmentation (allowance)",
}
WHERE = {
    "linear": "matrix products of the decoder, head",
    "attention": "attention, by mask area",
    "vision": "encoder and connector",
    "recompute": "activations computed again",
    "other": "norms, rotary, launches (allowance)",
    "imbalance": "waiting for the costliest packs",
    "bubble": "pipeline bubble",
    "tensor": "tensor-parallel exchange, not hidden",
    "context": "context-parallel exchange, not hidden",
    "gradients": "gradients and weights, not hidden",
}


def render(cfg: RunConfig, model: Molmo2Config, plan: Plan) -> Iterator[Any]:
    """Tables and remarks, at most 80 columns."""
    work, cluster, best = plan.work, plan.cluster, plan.best[0]
    yield (
        f"{model.name}, stage {cfg.stage.name}, on {cluster}\n{parameters(model).total / 1e9:.2f} B parameters; "
        f"{work.packs} packs per step of {work.length:,} tokens and {work.max_crops} crops; the mask allows "
        f"{work.area:.0%} of S x S;\n{best.step.flops.total / 1e15:.0f} PFLOP per step by mask area\n"
    )
    yield _best(plan)
    yield _others(plan)
    yield _parts(
        "memory of a GPU, " + best.layout.name, "GiB", WHAT, {k: v / GIB for k, v in best.memory.parts().items()}
    )
    yield _parts("a step, " + best.layout.name, "seconds", WHERE, best.step.parts())
    yield (
        f"per GPU and step {best.step.link_bytes / 1e9:.0f} GB inside the node, "
        f"{best.step.network_bytes / 1e9:.0f} GB over the network"
    )
    yield from _published(cfg, model, plan)
    yield f"\nto train so:\n  molmo2 train recipe={model.name} stage={cfg.stage.name} {_settings(plan)}"
    yield "\nPredicted from stated rates (molmo2_nemo/plan/rates.py), not measured on a cluster."


def _best(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="layouts", title_justify="left")
    table.add_column("layout")
    for name in ("packs at once", "recompute", "GiB", "s/step", "MFU", "GPU-hours"):
        table.add_column(name, justify="right")
    mine = [plan.configured] if plan.configured else []
    for c in plan.best + mine:
        again = c.layout.recompute + (", offload" if c.layout.offload else "")
        hours = c.step.gpu_hours(plan.cluster, plan.work.steps)
        full = "" if c.fits(plan.cluster) else " (too much)"
        table.add_row(
            c.layout.name + (", as configured" if c is plan.configured else ""),
            str(c.layout.micro_batch),
            again,
            f"{c.memory.total / GIB:.0f}{full}",
            f"{c.step.seconds:.1f}",
            f"{c.step.mfu(plan.cluster):.0%}",
            f"{hours:,.0f}",
        )
    return table


def _others(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="\nwhy not", title_justify="left")
    table.add_column("layout")
    table.add_column("reason", max_width=60)
    for candidate, why in plan.others[:OTHERS]:
        table.add_row(candidate.layout.name, why)
    if len(plan.others) > OTHERS:
        table.add_row(f"{len(plan.others) - OTHERS} more", "see --json")
    return table


def _parts(title: str, unit: str, words: dict[str, str], values: dict[str, float]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="\n" + title, title_justify="left")
    table.add_column("")
    table.add_column(unit, justify="right")
    table.add_column("")
    whole = sum(values.values())
    for name, value in values.items():
        if value >= 0.005:
            table.add_row(words[name], f"{value:.2f}", "█" * round(24 * value / whole))
    table.add_row("all", f"{whole:.2f}", "", style="bold")
    return table


def _settings(plan: Plan) -> str:
    return f"cluster.nodes={plan.cluster.nodes} {plan.best[0].layout.settings}"


def _published(cfg: RunConfig, model: Molmo2Config, plan: Plan) -> Iterator[str]:
    """The published way beside ours, for its stage 3."""
    if plan.work.length != 36864 or model.name not in HOURS or plan.cluster.gpus < 8:
        return
    step = sum(published_step(model, plan.work, plan.cluster).values())
    hours = published_gpu_hours(model, plan.work, plan.cluster)
    best = plan.best[0].step
    yield (
        f"\nthe published code, same accounting: {step:.1f} s/step, {hours:,.0f} GPU-hours, {step / best.seconds:.1f} "
        f"times ours.\nIts paper reports {HOURS[model.name] * 128:,.0f} on 128 H100."
    )
