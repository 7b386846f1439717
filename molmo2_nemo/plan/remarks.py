"""What a plan's reader must know besides its numbers: what was chosen for them, set otherwise than asked, or has no
effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.model.config import KernelConfig, MemoryConfig
from molmo2_nemo.model.flops import feature_bytes
from molmo2_nemo.plan.command import asked_otherwise
from molmo2_nemo.plan.memory import GIB
from molmo2_nemo.plan.search import Plan
from molmo2_nemo.plan.table import scaled
from molmo2_nemo.plan.words import model_of
from molmo2_nemo.settings.run import RunConfig


def remarks(cfg: RunConfig, plan: Plan, overrides: Sequence[str], *, cluster_given: bool) -> Iterator[str]:
    """Sentences, in the order of their weight.

    Args:
        overrides: what the user asked for.
        cluster_given: they named the cluster; else it was chosen for them.
    """
    layout = plan.best[0].layout
    if not cluster_given:
        yield f"no cluster= was given: {plan.cluster} was taken, {plan.why_cluster}"
    if plan.unplaced is not None:
        yield f"no row (as set): {plan.unplaced}"
    if changed := asked_otherwise(overrides, cfg, layout):
        yield f"set otherwise than you asked: {', '.join(changed)}"
    yield from _features(cfg, plan)
    yield from _without_effect(cfg.memory, plan, layout)
    if replace(cfg.kernels, flash="auto") != KernelConfig():
        yield "kernels.* changes the memory that is planned with; of the time only kernels.flash is known"


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


def _without_effect(memory: MemoryConfig, plan: Plan, layout: Layout) -> Iterator[str]:
    """Numbers that a pack of the run never reaches."""
    usual, packs = MemoryConfig(), layout.micro_batch
    crops = plan.work.max_crops * packs
    if memory.vision_chunk is not None and memory.vision_chunk >= crops:
        yield f"memory.vision_chunk={memory.vision_chunk} has no effect: a micro-batch has at most {crops:,} crops"
    tokens = plan.work.length * packs
    if memory.loss_chunk != usual.loss_chunk and memory.loss_chunk >= tokens:
        yield f"memory.loss_chunk={memory.loss_chunk} has no effect: a micro-batch has {tokens:,} tokens"
