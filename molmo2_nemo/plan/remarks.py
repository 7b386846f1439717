"""What a plan's reader must know besides its numbers: what was chosen for them, set otherwise than asked, or has no
effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from molmo2_nemo.cost.layout import RING_BALANCED, RING_BUSIEST, Layout
from molmo2_nemo.cost.workload import AVERAGES
from molmo2_nemo.model.config import KernelConfig
from molmo2_nemo.model.flops import feature_bytes
from molmo2_nemo.plan.command import asked_otherwise
from molmo2_nemo.plan.memory import GIB
from molmo2_nemo.plan.search import Plan
from molmo2_nemo.plan.table import scaled
from molmo2_nemo.plan.words import model_of
from molmo2_nemo.settings.remarks import memory_without_effect, phases_not_reached
from molmo2_nemo.settings.run import RunConfig

PIXELS_OF_A_NODE = 64e9  # bytes in host memory that a plan's reader hears of


def remarks(
    cfg: RunConfig, plan: Plan, overrides: Sequence[str], *, cluster_given: bool, counted: str | None = None
) -> Iterator[str]:
    """Sentences, in the order of their weight.

    Args:
        overrides: what the user asked for.
        cluster_given: they named the cluster; else it was chosen for them.
        counted: the file that the averages of packs are from, where there is one.
    """
    layout = plan.best[0].layout
    if not cluster_given:
        yield f"no cluster= was given: {plan.cluster} was taken, {plan.why_cluster}"
    if plan.unplaced is not None:
        yield f"no row (as set): {plan.unplaced}"
    if changed := asked_otherwise(overrides, cfg, layout):
        yield f"set otherwise than you asked: {', '.join(changed)}"
    if taken := _last_resort(cfg, layout):
        yield f"nothing fits with {', '.join(taken)}: the plan takes {', '.join(taken.values())}"
    yield from _assumed(cfg, plan, counted)
    yield from _features(cfg, plan)
    yield from memory_without_effect(
        cfg.memory,
        length=plan.work.length,
        crops=plan.work.max_crops,
        context=layout.context,
        micro_batch=layout.micro_batch,
    )
    if replace(cfg.kernels, flash="auto") != KernelConfig():
        yield "kernels.* changes the memory that is planned with; of the time only kernels.flash is known"


def _last_resort(cfg: RunConfig, layout: Layout) -> dict[str, str]:
    """Setting of the run -> the plan's, of those that a plan changes only where no layout fits without."""
    found = {}
    if layout.optimizer_offload and not cfg.memory.optimizer_offload:
        found["memory.optimizer_offload=false"] = "memory.optimizer_offload=true"
    if layout.fsdp and cfg.parallel.fsdp == "none":
        found["parallel.fsdp=none"] = "parallel.fsdp=megatron"
    return found


def _assumed(cfg: RunConfig, plan: Plan, counted: str | None) -> Iterator[str]:
    """What the prediction takes for granted, where it goes beyond what was counted."""
    work, longest = plan.work, AVERAGES[-1]
    yield from _lengths(cfg)
    if counted is not None:
        yield (
            f"of {counted}: {work.tokens / work.length:.1%} of a pack's tokens and {work.crops / work.max_crops:.1%} "
            f"of its crops in use, {work.scored / work.length:.1%} of tokens scored"
        )
    elif work.length > longest[0]:
        yield (
            f"longer packs than {longest[0]:,} tokens have not been counted: {longest[1]:.1%} of tokens and "
            f"{longest[2]:.0%} of crops in use, {work.area:.0%} of S x S allowed and {longest[4]:.0%} of tokens scored "
            "are taken. A text that fills its pack allows 50% (--area 0.5), a video whose frames all see each other "
            "nearly 100%; --packs counts your own shards"
        )
    if max(c.layout.context // c.layout.ulysses for c in plan.best) > max(RING_BUSIEST):
        yield (
            f"rings of more than {max(RING_BUSIEST)} ranks have not been counted: parallel.ring_balance=cost is taken "
            "to even them out as it does those"
        )
    mine = plan.configured and plan.configured.layout
    if mine and mine.busiest_of_ring > RING_BALANCED:
        yield (
            f"(as set): attention is counted as that of the ring's busiest rank, {mine.busiest_of_ring:g} times the "
            "mean as in mixed packs (less in a pack that is one video); with parallel.ring_balance=cost it is "
            f"{RING_BALANCED:g} times"
        )
    vision = model_of(cfg).vision
    pixels = work.max_crops * vision.num_patches * vision.patch_dim * plan.best[0].layout.micro_batch
    if (node := pixels * plan.cluster.per_node) > PIXELS_OF_A_NODE:
        yield (
            f"each process holds the pixels of its micro-batch in host memory, {scaled(pixels)}B, {scaled(node)}B a "
            "node; these are not planned"
        )


def _lengths(cfg: RunConfig) -> Iterator[str]:
    """What a plan of a run with packs of several lengths is of."""
    packing, full = cfg.data.packing, cfg.data.packing.sequence_length
    if cfg.data.progression:
        steps, until = cfg.stage.max_steps, min(cfg.stage.max_steps, cfg.data.progression[-1].until_step)
        shorter = ", ".join(f"{phase.sequence_length:,}" for phase in cfg.data.progression)
        yield (
            f"data.progression: every step is planned with the longest packs ({full:,} tokens); {until:,} of "
            f"{steps:,} have shorter ones ({shorter}), and take less time and memory"
        )
        yield from phases_not_reached(cfg)
    if not cfg.data.lengths:
        return
    crops = (full // one.sequence_length * (one.max_crops or packing.max_crops) for one in cfg.data.lengths)
    times = max(crops) / packing.max_crops
    many = f"may have {times:.3g} times the crops, which takes longer than planned" if times > 1 else "no more crops"
    yield (
        f"data.lengths: steps of the longest packs ({full:,} tokens) are planned; one of shorter packs has as many "
        f"tokens, less attention, and {many} (data.lengths[i].max_crops)"
    )


def _features(cfg: RunConfig, plan: Plan) -> Iterator[str]:
    """What keeping a frozen encoder's features comes to."""
    if plan.first_epoch is None:
        return
    kept, step, first = cfg.data.feature_cache, plan.best[0].step, plan.first_epoch.step
    size = feature_bytes(model_of(cfg), 2)
    fit = int(kept.max_gib * GIB / size)
    node = step.disk_bytes * plan.cluster.per_node / plan.best[0].layout.pipeline
    yield (
        f"data.feature_cache: times are of steps after the first epoch, when features are read in place of encoding; "
        f"{scaled(node)}B a node and step, at {kept.disk_gbs:g} GB/s (data.feature_cache.disk_gbs). In the first epoch "
        f"a step takes {first.seconds / step.seconds:.2f} times as long and writes as much. A crop takes "
        f"{scaled(size)}B: data.feature_cache.max_gib={kept.max_gib:g} holds {fit:,}, those of "
        f"{fit / (plan.work.crops * plan.work.packs):,.1f} steps; crops beyond are encoded in every epoch"
    )
    if step.seconds >= first.seconds:
        yield "data.feature_cache does not pay here: encoding is faster than this disk"
