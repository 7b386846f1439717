"""A plan as tables that fit a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from rich.table import Table

from molmo2_nemo.cost.parameters import parameters
from molmo2_nemo.errors import plural
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.plan.groups import Simulated
from molmo2_nemo.plan.memory import GIB
from molmo2_nemo.plan.published import HOURS, published_gpu_hours, published_step
from molmo2_nemo.plan.search import Candidate, Plan
from molmo2_nemo.rundir.progress import duration
from molmo2_nemo.settings.run import RunConfig

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
    "recompute": "activations recomputed",
    "other": "norms, rotary, launches (allowance)",
    "imbalance": "waiting for the costliest packs",
    "bubble": "pipeline bubble",
    "tensor": "tensor-parallel exchange, not hidden",
    "context": "context-parallel exchange, not hidden",
    "gradients": "gradients and weights, not hidden",
    "disk": "features read from disk, not hidden",
    "host": "optimizer on the host",
}


PHASES = {
    "loss": "at the loss",
    "decoder": "in a layer's backward",
    "vision": "in the encoder",
}


def render(cfg: RunConfig, model_config: Molmo2Config, plan: Plan) -> Iterator[str | Table]:
    """Tables and remarks, at most 80 columns."""
    work, cluster, best = plan.work, plan.cluster, plan.best[0]
    yield (
        f"{model_config.name}, stage {cfg.stage.name}, on {cluster}\n"
        f"{_parameters(model_config)} parameters; {plural(work.packs, 'pack')} per step, {plural(work.steps, 'step')}\n"
        f"packs of {work.length:,} tokens and {work.max_crops:,} crops; the mask allows {work.area:.0%} of S x S\n"
        f"{scaled(best.step.flops.total)}FLOP per step by mask area\n"
    )
    yield _best(plan)
    seconds = best.step.seconds * work.steps
    yield f"the stage takes {duration(seconds)} on {plural(cluster.gpus, 'GPU')} with the first of them"
    if plan.others:
        yield _others(plan)
    mine = [plan.configured] if plan.configured else []
    shown = [c.layout.name for c in (*plan.best, *mine, *(c for c, _ in plan.others[:OTHERS]))]
    if any(re.search(r"CP\d+x\d", name) for name in shown):
        yield "CP4x2: 4 ranks split a pack by heads (Ulysses), 2 such groups form a ring"
    yield _parts(
        f"memory of a GPU, {best.layout.name}, {PHASES[best.memory.phase]}",
        "GiB",
        WHAT,
        {k: v / GIB for k, v in best.memory.parts().items()},
    )
    yield _modes(plan)
    yield from _on_host(plan)
    unit, seconds = _time_unit(best.step.seconds)
    yield _parts(f"a step, {best.layout.name}", unit, WHERE, {k: v / seconds for k, v in best.step.parts().items()})
    if cluster.gpus > 1:
        network = f", {scaled(best.step.network_bytes)}B over the network" if cluster.nodes > 1 else ""
        yield f"per GPU and step {scaled(best.step.link_bytes)}B inside the node{network}"
    yield from _published(model_config, plan)


def scaled(value: float) -> str:
    """Three digits and a metric prefix: 8.66e9 is "8.66 G"."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{_digits(value / size)} {prefix}"
    return f"{_digits(value)} "


def _digits(value: float) -> str:
    """About three digits, never more than stand before the point: 0.0123, 1.23, 12.3, 1,234."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _parameters(model_config: Molmo2Config) -> str:
    total = parameters(model_config).total
    return f"{_digits(total / 1e9)} B" if total >= 1e9 else f"{_digits(total / 1e6)} M"


def _time_unit(seconds: float) -> tuple[str, float]:
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e-3)


def _best(plan: Plan) -> Table:
    mine = plan.configured
    rows = plan.best + ([mine] if mine and mine.layout not in [c.layout for c in plan.best] else [])
    unit, seconds = _time_unit(plan.best[0].step.seconds)
    table = _table(
        f"layouts{_legend(rows, plan)}",
        "layout",
        "micro-batch",
        "recompute",
        "GiB",
        f"{unit}/step",
        "MFU",
        "GPU-hours",
    )
    for c in rows:
        hours = c.step.gpu_hours(plan.cluster, plan.work.steps)
        table.add_row(
            c.layout.name + (" (as set)" if mine and c.layout == mine.layout else ""),
            str(c.layout.micro_batch),
            c.layout.recomputed,
            _gib(c, plan),
            f"{c.step.seconds / seconds:,.1f}",
            f"{c.step.mfu(plan.cluster):.0%}",
            _digits(hours) if hours >= 0.01 else "<0.01",
        )
    return table


def _gib(candidate: Candidate, plan: Plan) -> str:
    return f"{candidate.memory.total / GIB:,.0f}" + ("" if candidate.fits(plan.cluster) else " ✗")


def _legend(candidates: list[Candidate], plan: Plan) -> str:
    return "" if all(c.fits(plan.cluster) for c in candidates) else "; ✗: does not fit"


def _modes(plan: Plan) -> Table:
    best = plan.best[0].layout
    unit, seconds = _time_unit(plan.best[0].step.seconds)
    table = _table(
        f"\nrecomputation, {best.name}{_legend(plan.modes, plan)}",
        "recompute",
        "decoder",
        "vision",
        "all GiB",
        f"{unit}/step",
        "fullest",
    )
    for c in plan.modes:
        decoder, vision = (f"{x / GIB:,.2f}" for x in (c.memory.decoder, c.memory.vision))
        table.add_row(
            c.layout.recomputed,
            decoder,
            vision,
            _gib(c, plan),
            f"{c.step.seconds / seconds:,.1f}",
            PHASES[c.memory.phase],
        )
    return table


def _on_host(plan: Plan) -> Iterator[str]:
    """What offload takes of the host's memory."""
    for c in plan.modes:
        if c.layout.offload:
            host, node = scaled(c.memory.host), scaled(c.memory.host * plan.cluster.per_node)
            yield f"offload: {host}B of pinned host memory a GPU, {node}B a node"
    if updated := plan.best[0].memory.host_optimizer:
        node = scaled(updated * plan.cluster.per_node)
        yield f"optimizer on the host: {scaled(updated)}B of host memory a GPU, {node}B a node"


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _others(plan: Plan) -> Table:
    table = _table("\nwhy not, of each layout its fastest or leanest variant", "layout")
    table.add_column("reason", max_width=60)
    for candidate, why in plan.others[:OTHERS]:
        table.add_row(candidate.layout.name, why)
    if len(plan.others) > OTHERS:
        table.add_row(f"{len(plan.others) - OTHERS} more", "see --json")
    return table


def _parts(title: str, unit: str, words: dict[str, str], values: dict[str, float]) -> Table:
    table = _table("\n" + title, "", unit)
    table.add_column("")
    whole = sum(values.values())
    for name, value in values.items():
        if value > 0:
            shown = f"{value:,.2f}" if value >= 0.005 else "<0.01"
            table.add_row(words[name], shown, "█" * round(24 * value / whole))
    table.add_row("all", f"{whole:,.2f}", "", style="bold")
    return table


def groups_table(found: Simulated) -> Table:
    """Static and dynamic context groups on recorded packs; the times of the first row over those of the others."""
    title = f"\ncontext groups; steps of {plural(found.packs, 'pack')}"
    table = _table(title, "context ranks", "s/step", "faster")
    first = next(iter(found.seconds.values()), 0.0)
    for name, seconds in found.seconds.items():
        table.add_row(name, f"{seconds:,.3g}" if seconds < 100 else f"{seconds:,.0f}", f"{first / seconds:.2f}")
    return table


def _published(model_config: Molmo2Config, plan: Plan) -> Iterator[str]:
    """The published code beside the best plan, where the run is its stage 3."""
    if plan.work.length != 36864 or model_config.name not in HOURS or plan.cluster.gpus < 8:
        return
    step = sum(published_step(model_config, plan.work, plan.cluster).values())
    hours = published_gpu_hours(model_config, plan.work, plan.cluster)
    best = plan.best[0].step
    yield (
        f"\nthe published code, same accounting: {step:.1f} s/step, {hours:,.0f} GPU-hours, {step / best.seconds:.1f} "
        f"times ours.\nIts paper reports {HOURS[model_config.name] * 128:,.0f} on 128 H100."
    )
