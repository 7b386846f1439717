"""Dynamic context parallelism through the real trainer: packs of mixed lengths on 1, 2 and 4 ranks of a context group
give the loss and the gradients of one process."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from molmo2_nemo.cost.efficiency import EFFICIENCIES
from molmo2_nemo.cost.hardware import DEVICES
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.data.counts import used_tokens
from molmo2_nemo.model.config import MemoryConfig, preset
from molmo2_nemo.parallel.dynamic import rounded, without_padding
from molmo2_nemo.settings.run import ParallelConfig, StageConfig
from tests.support.packs import (
    demo_packs,
    padding_only,
    shared_packs,
    text_only,
    tiny_run,
    train_on_packs,
    weighing,
)

TRACED = ("loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm")
STEPS = 4


@pytest.fixture(scope="module")
def packs():
    """Real packs of 768 tokens between packs of a third of that, four for each step. Loss weights of the second step
    sum to less than 1, those of the last to nothing."""
    long, short = demo_packs(20), demo_packs(20, length=256)
    mixed = [batch for pair in zip(long[:8], short[:8], strict=True) for batch in pair]
    return [*mixed[:4], *weighing(mixed[4:8], 0.25), *mixed[8:12], *weighing(mixed[12:], 0)]


@pytest.fixture(scope="module")
def single(workers, packs, tmp_path_factory):
    return workers.run(train_on_packs, tiny_run(tmp_path_factory.mktemp("one"), STEPS), packs, ranks=1, fit=True)[0]


def recorded(cfg, packs):
    """Metrics, and how many ranks shared each pack that this rank worked on, step by step."""
    with shared_packs() as seen:
        return train_on_packs(cfg, packs), seen


@pytest.mark.parametrize(
    "layout",
    [
        {"context": 4, "context_ulysses": 2, "context_tokens": 300},
        {"tensor": 2, "sequence": True, "context": 2, "context_tokens": 500},
        {"pipeline": 2, "context": 2, "context_tokens": 500},
    ],
    ids=lambda layout: "+".join(f"{k}={v}" for k, v in layout.items()),
)
def test_follows_the_single_process(workers, packs, single, tmp_path, layout):
    cfg = tiny_run(tmp_path, STEPS, dynamic_context=True, **layout)
    results = workers.run(recorded, cfg, packs, ranks=4, fit=True)
    got = results[0][0]
    for name in TRACED:
        np.testing.assert_allclose([m[name] for m in got], [m[name] for m in single], rtol=1e-5, err_msg=name)
    assert [m["tokens"] for m in got] == [m["tokens"] for m in single]
    shared = {ranks for _, steps in results for step in steps for ranks, _ in step}
    assert len(shared) > 1 and max(shared) <= layout["context"]  # packs on different numbers of ranks
    sizes = [[len(step) for step in steps] for _, steps in results]
    assert any(len(set(counts)) > 1 for counts in zip(*sizes, strict=True)) or layout["context"] == 2


@pytest.fixture(scope="module")
def pairs():
    """Two packs a micro-batch; in each step one of text alone and one of padding alone."""
    long, short = demo_packs(4, micro_batch=2), demo_packs(4, length=256, micro_batch=2)
    short = [padded(batch, 768) for batch in short]
    return [b for n in range(4) for b in (long[n], text_only(short[n]), padding_only(short[n]), short[n])]


def padded(batch, size):
    """The same packs with room to `size` tokens."""
    used = batch.input_ids.shape[1]
    wide = {"input_ids": -1, "labels": -1, "loss_weights": 0, "position_ids": 0, "example_ids": -1, "branch_ids": -1}
    room = [(0, 0), (0, size - used)]
    arrays = {n: np.pad(getattr(batch, n), room, constant_values=v) for n, v in (wide | {"visual": False}).items()}
    packs, places = np.divmod(batch.pooled_positions, used)
    return replace(batch, **arrays, pooled_positions=packs * size + places)


@pytest.mark.parametrize(
    "layout",
    [
        {"context": 4, "context_tokens": 400, "context_crops": 12, "memory": {"recompute": "full"}},
        {"context": 2, "context_tokens": 768, "context_crops": 8, "memory": {"vision_chunk": 3}},
    ],
    ids=["4 ranks, recompute", "2 ranks, chunks"],
)
def test_pairs_of_packs_with_nothing_to_see_or_do(workers, pairs, single_of_pairs, tmp_path, layout):
    results = workers.run(recorded, run_of_pairs(tmp_path, **layout, dynamic_context=True), pairs, ranks=4, fit=True)
    got = results[0][0]
    for name in TRACED:
        np.testing.assert_allclose([m[name] for m in got], [m[name] for m in single_of_pairs], rtol=1e-5, err_msg=name)
    assert len({ranks for _, steps in results for step in steps for ranks, _ in step}) > 1


@pytest.fixture(scope="module")
def single_of_pairs(workers, pairs, tmp_path_factory):
    return workers.run(train_on_packs, run_of_pairs(tmp_path_factory.mktemp("one")), pairs, ranks=1, fit=True)[0]


def run_of_pairs(folder, **settings):
    cfg = tiny_run(folder, 2, **settings)
    cfg.stage.micro_batch_size, cfg.stage.global_batch_size = 2, 8
    return cfg


def test_unknown_hardware_is_said():
    """On CPU packs are weighed as on the default GPU, and one sentence says so; what is known of the run counts."""
    from molmo2_nemo.training.dynamic_context import DynamicSettings, context_cost

    parallel = ParallelConfig(context=4, tensor=2, context_ulysses=2, context_tokens=300, cp_comm_type="all_gather")
    memory = MemoryConfig(recompute="full", vision_chunk=8)
    settings = DynamicSettings(parallel, memory, StageConfig(train_vit=False), max_crops=24)
    cost, guesses = context_cost(settings, preset("tiny"))
    assert guesses == [
        "nothing is known of the speed of a CPU; packs are assigned to ranks as an H100 would take for them"
    ]
    assert (cost.step.device, cost.step.efficiency) == (DEVICES["h100"], EFFICIENCIES["flash2"])
    assert cost.layout == Layout(tensor=2, recompute="full", cp_comm_type="all_gather") and cost.ulysses == 2
    assert cost.step.memory == memory and not cost.step.trainable.vit and cost.step.bytes_per_element == 4


def test_cut_keeps_what_is_not_padding(packs):
    batch = packs[1]
    length = rounded(used_tokens(batch), 8)
    short = without_padding(batch, 8)
    assert short.input_ids.shape == (1, length) and (batch.example_ids[:, length:] == -1).all()
    assert (short.example_ids != -1).sum() == (batch.example_ids != -1).sum()
    np.testing.assert_array_equal(
        short.input_ids.reshape(-1)[short.pooled_positions], batch.input_ids.reshape(-1)[batch.pooled_positions]
    )
