"""Predicted times against numbers worked out by hand; the same for a pack as for an average that equals it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from molmo2_nemo.attention.automatic import automatic
from molmo2_nemo.attention.kernels import choose
from molmo2_nemo.cost.context import ContextCost
from molmo2_nemo.cost.efficiency import EFFICIENCIES, SAME_EFFICIENCY, Efficiency
from molmo2_nemo.cost.flops import forward_flops
from molmo2_nemo.cost.hardware import DEVICES, Cluster, device_called
from molmo2_nemo.cost.layout import RING_BALANCED, RING_BUSIEST, Layout
from molmo2_nemo.cost.step import ALL_TRAINED, StepCost, Work, step_time
from molmo2_nemo.cost.traffic import AttentionShape, ring_traffic, ulysses_traffic
from molmo2_nemo.cost.workload import Workload
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.model.config import MemoryConfig, preset
from molmo2_nemo.model.flops import connector_flops, crop_flops
from molmo2_nemo.settings.run import StageConfig

STAGE_3 = AttentionShape(tokens=36864, heads=32, kv_heads=8, head_size=128)
FREE = Efficiency(half_rate=0.0, hidden_communication=1.0, latency=0.0)  # nothing that is sent or waited for


def counts(unit_crops: list[int], **rest: int) -> PackCounts:
    units = np.array(unit_crops, np.int64)
    return PackCounts(tokens=30000, pairs=10**8, unit_crops=units, unit_pooled_tokens=units * 81, scored=1000, **rest)


def test_cost_is_work_over_efficiency():
    """A rank's share of each kind of work over what it reaches, by hand."""
    model = preset("8b")
    pack = counts([1] * 64, window_positions=64 * 729)
    work = forward_flops(model, tokens=30000, pairs=10**8, scored_tokens=1000)
    vit, connector = 64 * crop_flops(model), connector_flops(model, 64 * 81, 64 * 729)
    vision = vit + connector
    for recompute, attention_too in (("none", False), ("full", False), ("full", True)):
        again = recompute == "full"  # decoder layers and the encoder's blocks, but not connector and head
        layout = Layout(recompute=recompute, recompute_attention=attention_too)
        products = (3 + again) * work.linear + 3 * work.head
        attention = work.attention * ((1 + attention_too) / 0.35 + 2.5 / 0.27)
        shared = products / 0.62 + (3 * vision + again * vit) / 0.38 + attention
        expected = 1.12 * shared / 989e12
        cost = ContextCost(StepCost(model, efficiency=FREE), layout, unshared=0.0)
        for ranks in (1, 2, 8):
            assert cost.seconds(pack, ranks) == pytest.approx(expected / ranks)
    # one image of 64 crops cannot be divided
    whole = counts([64], window_positions=64 * 729)
    cost = ContextCost(StepCost(model, efficiency=FREE), unshared=0.0)
    undivided = 1.12 * 3 * vision / 0.38 / 989e12
    gain = cost.seconds(whole, 1) - cost.seconds(whole, 8)
    assert gain == pytest.approx((cost.seconds(whole, 1) - undivided) * 7 / 8)
    # few tokens of a rank make slow products
    slow = ContextCost(StepCost(model, efficiency=replace(FREE, half_rate=3750.0)), unshared=0.0)
    decoder = (work.linear + work.head) / 0.62
    assert slow.seconds(pack, 8) - cost.seconds(pack, 8) == pytest.approx(1.12 * 3 * decoder / 989e12 / 8)


def test_what_is_frozen_or_recomputed_counts():
    model, pack = preset("8b"), counts([1] * 64, window_positions=64 * 729)
    work = forward_flops(model, tokens=30000, pairs=10**8, scored_tokens=1000)
    second = 1.12 / 989e12

    def seconds(memory: MemoryConfig | None = None, **trainable: bool) -> float:
        step = StepCost(model, replace(ALL_TRAINED, **trainable), efficiency=FREE, memory=memory or MemoryConfig())
        return ContextCost(step).seconds(pack, 1)

    vit, connector = 64 * crop_flops(model), connector_flops(model, 64 * 81, 64 * 729)
    assert seconds() - seconds(vit=False) == pytest.approx(second * 2 * vit / 0.38)
    assert seconds() - seconds(llm=False, head=False) == pytest.approx(second * (work.linear + work.head) / 0.62)
    assert seconds(MemoryConfig(recompute_vision=True)) - seconds() == pytest.approx(second * vit / 0.38)
    assert seconds(MemoryConfig(recompute_vision=True), vit=False) == seconds(vit=False)
    assert seconds(MemoryConfig(vision_chunk=8)) - seconds() == pytest.approx(second * (vit + connector) / 0.38)


def test_a_pack_costs_what_an_average_step_of_it_does():
    """The planner's time and that of dynamic context parallelism are one function."""
    model, device = preset("8b"), DEVICES["h200"]
    work = Workload(1, 1, length=32768, tokens=32768, area=0.25, crops=256, max_crops=256, scored=1000)
    units = np.ones(256, np.int64)
    pack = PackCounts(32768, 32768**2 // 4, units, units * 81, 256 * 729, 1000)
    for layout in (Layout(context=8, ulysses=8, recompute="full"), Layout(2, 4, 4), Layout(context=16, ulysses=8)):
        step = step_time(model, StageConfig(), work, Cluster(device, 8, layout.model_size), layout)
        one = ContextCost(StepCost(model, device=device), layout, layout.ulysses, unshared=0.0)
        assert one.seconds(pack, layout.context) == pytest.approx(step.seconds - step.gradients)


def test_cost_counts_crops_of_the_busiest_rank():
    cost = ContextCost(StepCost(preset("8b")), Layout(tensor=2))
    assert [cost.crops_of_rank(counts([1] * 64), ranks) for ranks in (1, 2, 4)] == [32, 16, 8]
    assert [cost.crops_of_rank(counts([9, 1, 1, 9]), ranks) for ranks in (1, 2)] == [10, 9]
    assert cost.crops_of_rank(counts([]), 4) == 0


def test_an_empty_pack_costs_next_to_nothing():
    none = np.zeros(0, np.int64)
    cost = ContextCost(StepCost(preset("8b")), unshared=0.5)
    assert cost.seconds(PackCounts(0, 0, none, none), 1) == 0.5


def test_sharing_costs_what_is_sent():
    """Inside a node over links, beyond it over the network: heads where they are sharded, keys between nodes."""
    model, device = preset("8b"), DEVICES["h100"]
    pack = PackCounts(36864, 10**8, np.zeros(0, np.int64), np.zeros(0, np.int64))

    def seconds(ranks: int, ulysses: int | None = None, **speeds: float) -> float:
        step = StepCost(model, device=replace(device, **speeds))
        return ContextCost(step, ulysses=ulysses).seconds(pack, ranks)

    layers, exposed = 36, 0.7
    assert seconds(1) == seconds(1, link_gbs=225, network_gbs=25)
    for ranks, ulysses in ((8, None), (32, 8)):
        sent = ulysses_traffic(STAGE_3, ranks, ulysses or ranks).total().bytes
        slower = seconds(ranks, ulysses, link_gbs=225) - seconds(ranks, ulysses)
        assert slower == pytest.approx(layers * exposed * sent / (0.75 * 450e9))
    assert seconds(8) == seconds(8, network_gbs=25)
    slower = seconds(32, 8, network_gbs=25) - seconds(32, 8)
    assert slower == pytest.approx(layers * exposed * ring_traffic(STAGE_3, 32, 8).total().bytes / (0.8 * 50e9))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100pcie"),
        ("NVIDIA H100 NVL", "h100nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_are_known_by_what_torch_calls_them(name, expected):
    assert device_called(name) is (DEVICES[expected] if expected else None)


def test_every_kernel_has_figures():
    """Its own or those of another; and what the planner assumes is what a run picks."""
    assert set(EFFICIENCIES) | set(SAME_EFFICIENCY) == {
        *("flash2", "flash3", "flash4", "cudnn", "flash-cpu", "flex", "blocks")
    }
    assert set(SAME_EFFICIENCY.values()) <= set(EFFICIENCIES)
    for dtype in (torch.float32, torch.bfloat16):
        chosen = choose("auto", "cpu", dtype, 128)
        assert chosen.name == automatic("cpu", str(dtype).removeprefix("torch."), 128)
        assert chosen.implementation in SAME_EFFICIENCY
    assert automatic("cuda", "bfloat16", 128) == "flash" and automatic("cuda", "float32", 128) == "blocks"
    shares = [f.name for f in fields(Efficiency) if f.name not in ("half_rate", "latency")]
    assert all(0 < getattr(efficiency, name) < 1 for efficiency in EFFICIENCIES.values() for name in shares)


def test_reading_features_takes_the_place_of_encoding():
    """By hand: an encoder without time, and a disk that is waited for only where it takes longer than all else."""
    model, device = preset("4b"), DEVICES["h100"]
    frozen = StageConfig(train_vit=False)
    work = Workload(8, 1, length=16384, tokens=16384, area=0.3, crops=128, max_crops=128, scored=600)
    cluster, layout = Cluster(device, 8, 1), Layout(data=8)

    def step(disk_gbs: float | None):
        return step_time(model, frozen, work, cluster, layout, disk_gbs=disk_gbs)

    encoded, fast, slow = step(None), step(1e6), step(1.0)
    vit = 128 * crop_flops(model)
    assert encoded.vision - fast.vision == pytest.approx(vit / (0.38 * 989e12))
    assert (fast.disk, fast.disk_bytes) == (0.0, 128 * 729 * 2304 * 2) and encoded.disk_bytes == 0
    assert fast.flops.vit == 0 < encoded.flops.vit and fast.flops.linear == encoded.flops.linear
    reading = fast.disk_bytes * 8 / 1e9  # eight GPUs share a disk of 1 GB/s
    busy = fast.seconds - fast.imbalance - fast.gradients
    assert slow.disk == pytest.approx(reading - busy) and slow.seconds == pytest.approx(fast.seconds + slow.disk)


def test_a_ring_waits_for_its_busiest_rank():
    """Attention alone takes longer by the busiest rank's share, unless tokens are shared out by their pairs."""
    model = preset("8b")
    pack = Work.of(model, PackCounts(36864, 10**8, np.zeros(0, np.int64), np.zeros(0, np.int64)), Layout())

    def one(ulysses: int, balance: str = "none") -> Any:
        return StepCost(model).micro_batch(pack, Layout(context=8, ulysses=ulysses, ring_balance=balance))

    even = one(8)
    assert one(8, "cost").attention == even.attention
    for ulysses, ranks in ((4, 2), (2, 4), (1, 8)):
        assert one(ulysses).attention == pytest.approx(RING_BUSIEST[ranks] * even.attention)
        assert one(ulysses, "cost").attention == pytest.approx(RING_BALANCED * even.attention)
        assert one(ulysses).linear == even.linear
    assert list(RING_BUSIEST.values()) == sorted(RING_BUSIEST.values()) and RING_BUSIEST[1] == 1 < RING_BALANCED
