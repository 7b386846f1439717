"""Seconds of a micro-batch and of an optimizer step, component by component: the one cost model of a step. No torch.

    a micro-batch    (products + attention + vision + recomputation) * (1 + other) + communication that is not hidden,
                     + reading a frozen encoder's features, as far as it takes longer than all that
    a step           its micro-batches + waiting for the costliest rank + pipeline bubble + gradients

Operations are those of cost/flops.py, bytes those of cost/traffic.py; both are divided by what share of the hardware's
figures (cost/hardware.py) such work reaches (cost/efficiency.py). Whoever predicts time asks here: the planner for the
average micro-batch of a run (`step_time`), dynamic context parallelism for one pack on so many ranks (cost/context.py).
The utilisation that a run logs is the same operations over the same peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

from molmo2_nemo.cost.efficiency import ATTENTION_BACKWARD, EFFICIENCIES, Efficiency
from molmo2_nemo.cost.flops import Flops, forward_flops, layer_weights, pack_flops, qkv_weights, trained_flops
from molmo2_nemo.cost.hardware import DEVICES, Cluster, Device, utilisation
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.parameters import held, parameters
from molmo2_nemo.cost.traffic import (
    AttentionShape,
    Traffic,
    gradient_traffic,
    keys_traffic,
    tensor_traffic,
    ulysses_traffic,
)
from molmo2_nemo.cost.workload import Workload
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.model.config import MemoryConfig, Molmo2Config, Trainable
from molmo2_nemo.model.flops import connector_flops, crop_flops, feature_bytes, unit_costs
from molmo2_nemo.parallel.partition import even_runs
from molmo2_nemo.settings.run import StageConfig

ALL_TRAINED = Trainable(vit=True, connector=True, llm=True, norms=True, adapters=False, base_embedding=True, head=True)
DEFAULT_DEVICE = DEVICES["h100"]  # where nothing is known of the real one


@dataclass(frozen=True)
class Work:
    """One micro-batch, all its ranks together."""

    forward: Flops  # operations of the forward pass; linear layers are counted over `tokens`
    tokens: int  # tokens that the decoder works on, with padding where that is not cut
    vision_share: float  # share of encoder and connector that falls to the rank with the most of it

    @classmethod
    def average(cls, model_config: Molmo2Config, work: Workload, layout: Layout) -> Work:
        """The work of a run's average micro-batch. Crops are taken to be sharded evenly."""
        pack = forward_flops(
            model_config,
            tokens=round(work.length),
            pairs=work.pairs,
            crops=round(work.crops),
            pooled_tokens=round(work.pooled_tokens),
            window_positions=round(work.window_positions),
            scored_tokens=round(work.scored),
        )
        share = 1 / (layout.context * layout.tensor)
        return cls(pack * layout.micro_batch, work.length * layout.micro_batch, share)

    @classmethod
    def of(cls, model_config: Molmo2Config, pack: PackCounts, layout: Layout) -> Work:
        """The work of one micro-batch, from its counts. Crops are sharded in whole units."""
        share = busiest_share(model_config, pack, layout.context * layout.tensor)
        return cls(pack_flops(model_config, pack), pack.tokens, share)


def unit_runs(model_config: Molmo2Config, pack: PackCounts, ranks: int) -> list[int]:
    """Ends of the runs of units that so many ranks encode, as parallel/crops.py shards them."""
    return even_runs(unit_costs(model_config, pack.unit_crops, pack.unit_pooled_tokens), ranks)


def busiest_share(model_config: Molmo2Config, pack: PackCounts, ranks: int) -> float:
    """Share of a pack's vision work that the rank with most of it has."""
    if not pack.crops:
        return 0.0
    positions = pack.window_positions / max(1, pack.pooled_tokens)  # filled ones of a pooled token
    pooling = connector_flops(model_config, 1, positions)
    costs = pack.unit_crops * crop_flops(model_config) + pack.unit_pooled_tokens * pooling
    bounds = unit_runs(model_config, pack, ranks)
    return max(float(costs[a:b].sum()) for a, b in zip(bounds, bounds[1:], strict=False)) / float(costs.sum())


@dataclass(frozen=True)
class MicroBatch:
    """Seconds of a micro-batch, forward and backward, on a rank of the layout, by component."""

    linear: float  # matrix products of the decoder, and the head
    attention: float
    vision: float
    recompute: float
    other: float
    tensor: float  # communication that is not hidden
    context: float
    disk: float = 0.0  # reading of kept features that is not hidden

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Communication:
    """What a rank sends for a micro-batch in all layers of its pipeline stage, in one dimension of the layout."""

    kind: str  # tensor or context
    traffic: Traffic
    inside: bool  # of a node: over its links, not over the network


@dataclass(frozen=True)
class StepCost:
    """Predicts the time of micro-batches.

    Args:
        trainable: parts that are trained; frozen ones have less of a backward, or none.
        device: the GPU.
        per_node: GPUs of a node; what they send each other goes over links, all else over the network.
        efficiency: what share of the hardware's figures is reached.
        memory: settings that say which tiles and chunks are recomputed.
        bytes_per_element: of an activation.
        fp8: the decoder's linear layers multiply in FP8, at the same share of its peak; all else in bf16.
        disk_gbs: GB/s that a node reads kept features of a frozen encoder at, one micro-batch ahead; None: crops are
            encoded.
    """

    model_config: Molmo2Config
    trainable: Trainable = ALL_TRAINED
    device: Device = DEFAULT_DEVICE
    per_node: int = 8
    efficiency: Efficiency = EFFICIENCIES["flash2"]
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    bytes_per_element: int = 2
    fp8: bool = False
    disk_gbs: float | None = None

    def micro_batch(self, work: Work, layout: Layout) -> MicroBatch:
        """Predicted seconds of a micro-batch, forward and backward, on the ranks of one replica."""
        efficiency, ranks = self.efficiency, layout.model_size
        forward = self.computed(work.forward)
        both = trained_flops(forward, self.trainable)
        tokens = work.tokens / (layout.context * layout.tensor)
        share = ranks * efficiency.matrix_share(max(1.0, tokens))
        faster = self.device.fp8_peak / self.device.peak if self.fp8 else 1.0
        products = share * self.device.peak * faster
        attention = forward.attention / ranks / self.device.peak * layout.busiest_of_ring
        there, back = (attention / efficiency.attention_forward, attention / efficiency.attention_backward)
        vision = work.vision_share / (efficiency.vision * self.device.peak)
        linear = (both.linear + both.head * faster) / products
        recompute = self._recompute(layout, forward.linear / products, there, forward * vision)
        encoding = (both.vit + both.connector) * vision
        computing = linear + there + ATTENTION_BACKWARD * back + encoding + recompute
        exposed = {"tensor": 0.0, "context": 0.0}
        for sent in self.communications(work.tokens, layout):
            exposed[sent.kind] += self.exposed(sent)
        busy = (1 + efficiency.other) * computing + sum(exposed.values())
        return MicroBatch(
            linear=linear,
            attention=there + ATTENTION_BACKWARD * back,
            vision=encoding,
            recompute=recompute,
            other=efficiency.other * computing,
            disk=max(0.0, self.reading(work, layout) - busy),
            **exposed,
        )

    def computed(self, forward: Flops) -> Flops:
        """Without what is read in place of being computed."""
        return forward if self.disk_gbs is None else replace(forward, vit=0.0)

    def read_bytes(self, work: Work) -> float:
        """Bytes of kept features that the rank with the most of them reads for a micro-batch."""
        if self.disk_gbs is None:
            return 0.0
        crops = work.forward.vit / crop_flops(self.model_config)
        return crops * work.vision_share * feature_bytes(self.model_config, self.bytes_per_element)

    def reading(self, work: Work, layout: Layout) -> float:
        """Seconds that it takes, while all ranks of the node that encode read."""
        readers = max(1.0, self.per_node / layout.pipeline)
        return 0.0 if self.disk_gbs is None else self.read_bytes(work) * readers / (1e9 * self.disk_gbs)

    def _recompute(self, layout: Layout, linear: float, attention: float, vision: Flops) -> float:
        """Seconds of recomputation in backward, from the seconds of the forward pass.

        Args:
            vision: seconds of `vit` and `connector`, the rest unused.
        """
        model_config = self.model_config
        mlps = linear * 3 * model_config.text.hidden_size * model_config.text.ffn_size / layer_weights(model_config)
        if layout.keeps_attention(model_config.attention):
            attention = 0.0
        seconds = {"none": 0.0, "selective": mlps, "full": linear + attention}[layout.recompute]
        if (
            self.memory.sequence_chunk is not None
        ):  # keys and values of all chunks before anything else, in both passes;
            # and in backward once more, differentiated by themselves (model/chunks.py)
            seconds += linear * 5 * qkv_weights(model_config) / layer_weights(model_config)
        if self.memory.mlp_tiles > 1 and layout.recompute != "selective":
            seconds += mlps
        if self.memory.vision_recomputed_with(layout.recompute) and self.trainable.vit:
            seconds += vision.vit
        if self.memory.vision_chunk is not None:
            seconds += vision.vit + vision.connector
        return seconds

    def communications(self, tokens: int, layout: Layout) -> list[Communication]:
        """What a rank sends for a micro-batch of so many tokens. The formulas are tested against the collectives."""
        text, recompute = self.model_config.text, layout.recompute == "full"
        shape = AttentionShape(
            tokens=tokens,
            heads=max(1, text.num_heads // layout.tensor),
            kv_heads=max(1, text.num_kv_heads // layout.tensor),
            head_size=text.head_dim,
            bytes_per_element=self.bytes_per_element,
        )
        split = tensor_traffic(
            tokens // layout.context, text.hidden_size, self.bytes_per_element, layout.tensor, layout.sequence
        )
        heads = ulysses_traffic(shape, layout.context, layout.ulysses)
        keys = keys_traffic(shape, layout.context, layout.ulysses, layout.cp_comm_type)
        chunk = self.memory.sequence_chunk
        # Layers in chunks show keys once in each pass, as without recomputation
        keys_again = recompute and not layout.keeps_attention(self.model_config.attention) and chunk is None
        chunks = 1 if chunk is None else math.ceil(tokens / layout.context / layout.micro_batch / chunk)
        layers = text.num_layers / layout.pipeline
        return [
            Communication(
                kind,
                replace(sent := steps.total(again) * layers, messages=sent.messages * times),
                ranks * layout.tensor <= self.per_node,
            )
            for kind, steps, again, ranks, times in (
                ("tensor", split, recompute, 1, chunks),
                ("context", heads, recompute, layout.ulysses, chunks),
                ("context", keys, keys_again, layout.context, 1),
            )
        ]

    def speed(self, inside: bool) -> float:
        """Bytes per second that a rank sends inside a node (`inside`), or to other nodes."""
        device, efficiency = self.device, self.efficiency
        return 1e9 * (efficiency.link * device.link_gbs if inside else efficiency.network * device.network_gbs)

    def exposed(self, sent: Communication) -> float:
        """Seconds of communication that computing does not hide."""
        traffic, efficiency = sent.traffic, self.efficiency
        sending = (1 - efficiency.hidden_communication) * traffic.bytes / self.speed(sent.inside)
        return sending + traffic.messages * efficiency.latency


# Assumed: PCIe 5.0 with 16 lanes, one direction; a GPU's share of the bandwidth of host memory, of servers with eight
PCIE_GBS, HOST_GBS = 64.0, 50.0
NO_SECONDS = ("flops", "link_bytes", "network_bytes", "disk_bytes")  # fields of a Step: the others add up to its time


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
    tensor: float  # communication that is not hidden
    context: float
    gradients: float
    flops: Flops  # of the model: forward and backward of all packs
    link_bytes: float = 0.0  # per GPU
    network_bytes: float = 0.0
    disk: float = 0.0  # reading of kept features that is not hidden
    disk_bytes: float = 0.0  # of it, per GPU that encodes
    host: float = 0.0  # the optimizer's update on the host

    def parts(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NO_SECONDS}

    @property
    def seconds(self) -> float:
        return sum(self.parts().values())

    def mfu(self, cluster: Cluster) -> float:
        """Model FLOPs by mask area over the peak of all GPUs."""
        return utilisation(self.flops.total, self.seconds, cluster.peak)

    def gpu_hours(self, cluster: Cluster, steps: int) -> float:
        return self.seconds * steps * cluster.gpus / 3600


def step_time(
    model_config: Molmo2Config,
    stage: StageConfig,
    work: Workload,
    cluster: Cluster,
    layout: Layout,
    efficiency: Efficiency = EFFICIENCIES["flash2"],
    options: MemoryConfig | None = None,
    *,
    fp8: bool = False,
    bf16_gradients: bool = False,
    disk_gbs: float | None = None,
) -> Step:
    """Predicts a run's average optimizer step under one layout.

    Args:
        options: memory settings; what they recompute takes time.
        fp8: the decoder multiplies in FP8.
        bf16_gradients: gradients are reduced in bf16, not fp32.
        disk_gbs: GB/s that a node reads a frozen encoder's features at; None: crops are encoded.
    """
    cost = StepCost(
        model_config,
        stage.trainable(model_config),
        cluster.device,
        cluster.per_node,
        efficiency,
        options or MemoryConfig(),
        fp8=fp8,
        disk_gbs=disk_gbs,
    )
    average = Work.average(model_config, work, layout)
    one, count = cost.micro_batch(average, layout), work.packs / (layout.data * layout.micro_batch)
    parts = {f.name: getattr(one, f.name) * count for f in fields(one)}
    computing = sum(parts.values()) - parts["tensor"] - parts["context"] - parts["disk"]
    # balancing evens out several micro-batches to 5 %; one each can only be ordered (benchmarks/results/packing-*)
    waits = 0.0 if layout.data == 1 else 0.05 if count >= 2 else 0.25
    useful = cost.computed(average.forward) * (1 / layout.micro_batch)
    useful = replace(useful, linear=useful.linear * work.tokens / work.length)
    gradients, inside, beyond = _gradients(cost, stage, cluster, layout, bf16_gradients, count)
    for sent in cost.communications(average.tokens, layout):
        inside += sent.traffic.bytes * count * sent.inside
        beyond += sent.traffic.bytes * count * (not sent.inside)
    return Step(
        **parts,
        imbalance=waits * computing,
        bubble=(layout.pipeline - 1) / max(1.0, count) * computing,
        gradients=gradients,
        flops=trained_flops(useful, cost.trainable) * work.packs,
        link_bytes=inside,
        network_bytes=beyond,
        disk_bytes=cost.read_bytes(average) * count,
        host=_update_on_host(cost, stage, layout),
    )


def _update_on_host(cost: StepCost, stage: StageConfig, layout: Layout) -> float:
    """Seconds of an update in host memory: fp32 gradients come, bf16 weights go, and AdamW reads four numbers of a
    parameter and writes three. Nothing of it is taken to be hidden."""
    if not layout.optimizer_offload:
        return 0.0
    mine = held(cost.model_config, stage, layout.tensor, layout.pipeline).trained / (layout.data * layout.context)
    moved, touched = (4 + 2) * mine, (7 * 4 + 4 + 2) * mine
    return moved / (1e9 * cost.efficiency.link * PCIE_GBS) + touched / (1e9 * HOST_GBS)


def _sharded_bytes(cost: StepCost, stage: StageConfig, layout: Layout, count: float, gradient_bytes: int) -> float:
    """Bytes that a GPU sends in a step for sharded parameters. In each of `count` micro-batches bf16 layers are
    gathered for forward and for backward, and gradients reduced; what is outside the layers is gathered once."""
    mine, rows = held(cost.model_config, stage, 1, 1), parameters(cost.model_config)
    layers = rows.layer * rows.layers
    ranks = layout.data * layout.context
    each = 2 * 2 * layers + gradient_bytes * mine.trained
    return (ranks - 1) / ranks * (count * each + 2 * (mine.all - layers))


def _gradients(
    cost: StepCost, stage: StageConfig, cluster: Cluster, layout: Layout, bf16: bool, count: float
) -> tuple[float, float, float]:
    """Seconds of a step's reduction of gradients, and of gathering sharded parameters, that are not hidden; bytes per
    GPU over links and over the network."""
    trained = held(cost.model_config, stage, layout.tensor, layout.pipeline).trained
    gradients = gradient_traffic(round(trained), layout.data * layout.context, gradient_bytes=2 if bf16 else 4)
    if layout.fsdp:
        gradients = replace(gradients, bytes=_sharded_bytes(cost, stage, layout, count, 2 if bf16 else 4))
    one_node = layout.model_size * layout.data <= cluster.per_node
    together = max(1, cluster.per_node // (layout.tensor * layout.pipeline))  # ranks of that group in a node
    speed = cost.speed(True) if one_node else min(cost.speed(True), cost.speed(False) * together)
    seconds = (1 - cost.efficiency.hidden_gradients) * gradients.bytes / speed
    return (seconds, gradients.bytes, 0.0) if one_node else (seconds, 0.0, gradients.bytes / together)
