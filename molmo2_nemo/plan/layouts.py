"""Every way to spread a model over a cluster that the model, the cluster and the batch allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from molmo2_nemo.cost.hardware import Cluster
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.parallel.partition import can_shard_heads
from molmo2_nemo.settings.run import RunConfig

# What is recomputed, from the fastest to the leanest: fields of Layout.
RECOMPUTE_MODES: tuple[dict[str, Any], ...] = (
    {"recompute": "none"},
    {"recompute": "selective"},
    {"recompute": "full"},
    {"recompute": "full", "recompute_attention": True},
    {"recompute": "full", "offload": True},
)
# Context ranks that are looked at: so many, or as many as leave each rank of a longer pack so many tokens.
CONTEXT_RANKS, TOKENS_OF_A_RANK = 32, 4096
PLAIN_MODE: dict[str, Any] = {"recompute": "none", "recompute_attention": False, "offload": False}


def layouts(
    model_config: Molmo2Config, cluster: Cluster, packs: int, length: int, cp_comm_type: str = "ring"
) -> Iterator[Layout]:
    """Every layout that the model, the cluster and the batch allow, rings balanced.

    Args:
        packs: per optimizer step.
        length: tokens of a pack.
        cp_comm_type: how context ranks of several nodes see each other's keys.
    """
    text, most = model_config.text, max(CONTEXT_RANKS, length // TOKENS_OF_A_RANK)
    for tensor in _powers(cluster.per_node):
        if text.num_heads % tensor or text.num_kv_heads % tensor or text.ffn_size % tensor:
            continue
        for context in _powers(min(most, cluster.gpus // tensor)):
            for pipeline in _powers(min(8, cluster.gpus // (tensor * context))):
                data, left = divmod(cluster.gpus, tensor * context * pipeline)
                ulysses = min(context, max(1, cluster.per_node // tensor))
                if left or packs % data or text.num_layers % pipeline or length % (context * tensor):
                    continue
                if not can_shard_heads(text.num_heads // tensor, text.num_kv_heads // tensor, ulysses):
                    continue
                for micro_batch in (1, 2, 4):
                    if packs % (data * micro_batch):
                        continue
                    for mode in RECOMPUTE_MODES:
                        across: dict[str, Any] = {}
                        if ulysses < context:
                            across = {"cp_comm_type": cp_comm_type, "ring_balance": "cost"}
                        yield Layout(tensor, context, ulysses, pipeline, data, micro_batch, **across, **mode)


def layout_of(cfg: RunConfig, replicas: int) -> Layout:
    """The layout that a run's settings have."""
    p, m = cfg.parallel, cfg.memory
    return Layout(
        p.tensor,
        p.context,
        p.context_ulysses or p.context,
        p.pipeline,
        replicas,
        cfg.stage.micro_batch_size,
        m.recompute,
        m.offload,
        p.cp_comm_type if p.context_ulysses not in (None, p.context) else "ring",
        m.recompute_attention,
        p.ring_balance,
        m.optimizer_offload,
        p.fsdp == "megatron",
    )


def number_formats(cfg: RunConfig) -> dict[str, bool]:
    """What of a run is not in bf16 with fp32 gradients, as `memory` and `step_time` take it."""
    return {"fp8": cfg.cluster.precision == "fp8", "bf16_gradients": cfg.parallel.grad_reduce == "bf16"}


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2
