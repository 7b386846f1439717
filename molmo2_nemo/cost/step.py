"""Time of one optimizer step, component by component, from rates (rates.py) that can be replaced."""

from __future__ import annotations

from dataclasses import dataclass, replace

from molmo2_nemo.cost.flops import Flops, forward_flops, layer_weights, training_flops
from molmo2_nemo.cost.hardware import Cluster
from molmo2_nemo.cost.parameters import held
from molmo2_nemo.cost.rates import ATTENTION_BACKWARD, Rates
from molmo2_nemo.cost.traffic import (
    AttentionShape,
    Traffic,
    gradient_traffic,
    ring_traffic,
    tensor_traffic,
    ulysses_traffic,
)
from molmo2_nemo.cost.workload import Workload
from molmo2_nemo.model.config import MemoryConfig, Molmo2Config
from molmo2_nemo.plan.layout import Layout
from molmo2_nemo.settings.run import StageConfig

PARTS = (
    "linear",
    "attention",
    "vision",
    "recompute",
    "other",
    "imbalance",
    "bubble",
    "tensor",
    "context",
    "gradients",
)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step by component, and what was computed and sent in it."""

    linear: float
    attention: float
    vision: float
    recompute: float
    other: float
    imbalance: float  # waiting for the data-parallel rank with the costliest packs
    bubble: float  # pipeline stages without work
    tensor: float  # exchanges that are not hidden
    context: float
    gradients: float
    flops: Flops  # of the model: forward and backward of all packs
    link_bytes: float = 0.0  # per GPU
    network_bytes: float = 0.0

    def parts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in PARTS}

    @property
    def seconds(self) -> float:
        return sum(self.parts().values())

    def mfu(self, cluster: Cluster) -> float:
        """Model FLOPs by mask area over the peak of all GPUs."""
        return self.flops.total / (self.seconds * cluster.gpus * cluster.device.tflops * 1e12)

    def gpu_hours(self, cluster: Cluster, steps: int) -> float:
        return self.seconds * steps * cluster.gpus / 3600


def step_time(
    model: Molmo2Config,
    stage: StageConfig,
    work: Workload,
    cluster: Cluster,
    layout: Layout,
    rates: Rates | None = None,
    options: MemoryConfig | None = None,
) -> Step:
    """Predicted step of one layout; of `options`, what is computed twice counts."""
    rates, options = rates or Rates(), options or MemoryConfig()
    peak = cluster.device.tflops * 1e12
    packs = work.packs / layout.data  # of one replica in a step
    pack = forward_flops(
        model,
        tokens=round(work.length),  # padding is computed too
        pairs=work.pairs,
        crops=round(work.crops),
        pooled_rows=round(work.pooled_rows),
        pooled_slots=round(work.pooled_slots),
        scored_tokens=round(work.scored),
    )
    ranks = layout.model_size
    tokens = work.length * layout.micro_batch / (layout.context * layout.tensor)
    matrix = rates.matrix_share(tokens) * peak
    trains = stage.trainable(model)
    passes = {f"train_{part}": getattr(trains, part) for part in ("vit", "connector", "llm", "head")}
    all_passes = training_flops(pack, **passes)
    linear = pack.linear / matrix / ranks * packs
    products = (all_passes.linear + all_passes.head) / matrix / ranks * packs
    forward = pack.attention / (rates.attention_forward * peak) / ranks * packs
    backward = ATTENTION_BACKWARD * pack.attention / (rates.attention_backward * peak) / ranks * packs
    spread = rates.vision * peak * layout.context * layout.tensor  # crops are dealt to the ranks of a pack
    vit, connector = pack.vit / spread * packs, pack.connector / spread * packs
    again = twice(model, stage, layout, options, linear=linear, attention=forward, vit=vit, connector=connector)
    vision = (all_passes.vit + all_passes.connector) / spread * packs
    busy = products + forward + backward + vision + again
    other = rates.other * busy
    micro_batches = max(1.0, packs / layout.micro_batch)
    # dealing a step's micro-batches evens them out to 5 %; one each can only be ordered (benchmarks/results/packing-*)
    waits = 0.0 if layout.data == 1 else 0.05 if micro_batches >= 2 else 0.25
    bubble = (layout.pipeline - 1) / micro_batches
    links, network, exposed = exchanges(model, stage, work, cluster, layout, rates)
    useful = replace(pack, linear=pack.linear * work.tokens / work.length)
    return Step(
        linear=products,
        attention=forward + backward,
        vision=vision,
        recompute=again,
        other=other,
        imbalance=waits * (busy + other),
        bubble=bubble * (busy + other),
        flops=training_flops(useful, **passes) * work.packs,
        link_bytes=links,
        network_bytes=network,
        **exposed,
    )


def twice(
    model: Molmo2Config,
    stage: StageConfig,
    layout: Layout,
    options: MemoryConfig,
    *,
    linear: float,
    attention: float,
    vit: float,
    connector: float,
) -> float:
    """Seconds of what is computed again in backward, from those of the forward pass."""
    mlps = linear * 3 * model.text.hidden_size * model.text.ffn_size / layer_weights(model)
    again = {"none": 0.0, "selective": mlps, "full": linear + attention}[layout.recompute]
    if options.mlp_tiles > 1 and layout.recompute != "selective":
        again += mlps
    if layout.recompute == "full" and stage.train_vit:
        again += vit
    if options.vision_chunk is not None:
        again += vit + connector
    return again


def exchanges(
    model: Molmo2Config, stage: StageConfig, work: Workload, cluster: Cluster, layout: Layout, rates: Rates
) -> tuple[float, float, dict[str, float]]:
    """Bytes per GPU and step over links and over the network, and the seconds of each kind that are not hidden.

    What is sent is counted by cost/traffic.py, which is tested against the collectives.
    """
    text, device, ulysses = model.text, cluster.device, layout.ulysses
    link, network = rates.link * device.link_gbs * 1e9, rates.network * device.network_gbs * 1e9
    micro_batches = work.packs / (layout.data * layout.micro_batch)
    times = micro_batches * text.num_layers / layout.pipeline
    again = layout.recompute == "full"
    tokens = work.length * layout.micro_batch
    shape = AttentionShape(
        tokens, text.num_heads // layout.tensor, max(1, text.num_kv_heads // layout.tensor), text.head_dim
    )
    heads = ulysses_traffic(shape, layout.context, ulysses).total(again) * times
    across = layout.context > ulysses
    keys = (ring_traffic(shape, layout.context, ulysses).total(again) if across else Traffic()) * times
    split = tensor_traffic(tokens // layout.context, text.hidden_size, 2, layout.tensor, True).total(again) * times
    trained, ranks = held(model, stage, layout.tensor, layout.pipeline).trained, layout.data * layout.context
    gradients = gradient_traffic(round(trained), ranks)
    one_node = layout.model_size * layout.data <= cluster.per_node
    together = max(1, cluster.per_node // (layout.tensor * layout.pipeline))  # ranks of that group in a node
    gradient_rate = link if one_node else min(link, network * together)

    def exposed(traffic: Traffic, rate: float) -> float:
        return (1 - rates.hidden_exchange) * traffic.bytes / rate + traffic.messages * rates.latency

    seconds = {
        "tensor": exposed(split, link),
        "context": exposed(heads, link) + exposed(keys, network),
        "gradients": (1 - rates.hidden_gradients) * gradients.bytes / gradient_rate,
    }
    inside = split.bytes + heads.bytes + (gradients.bytes if one_node else 0.0)
    return inside, keys.bytes + (0.0 if one_node else gradients.bytes / together), seconds
