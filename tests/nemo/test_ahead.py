"""Micro-batches made one ahead, through the real trainer and the real loader: the same training to the last bit, and
the same resume."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from tests.support.packs import demo_data, demo_packs, tiny_run, train_on_packs
from tests.support.thorough import mostly

STEPS = 3
TRACED = ("loss", "tasks", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm", "tokens", "crops")


def trained(cfg, packs) -> tuple[list[dict], list[str], int, int]:
    """Job: metrics; the threads that made micro-batches ready; how many came with their plan; crops on this rank."""
    import threading

    from molmo2_nemo.model.molmo2 import Molmo2Model
    from molmo2_nemo.training.step import MicroBatches

    threads, planned, crops = [], [], []
    made, forward = MicroBatches.made, Molmo2Model.forward

    def watched(self, batch, *rest, **options):
        threads.append(threading.current_thread().name)
        return made(self, batch, *rest, **options)

    def seen(self, inputs):
        planned.append(inputs.plan is not None)
        crops.append(len(inputs.crops))
        return forward(self, inputs)

    MicroBatches.made, Molmo2Model.forward = watched, seen
    try:
        return train_on_packs(cfg, packs), threads, sum(planned), sum(crops)
    finally:
        MicroBatches.made, Molmo2Model.forward = made, forward


LAYOUTS = {
    "dp2": (2, {}),
    "cp2, cut padding": (2, {"context": 2, "context_ulysses": 1, "cut_padding": True}),
    "pp2": (2, {"pipeline": 2}),
    "tp2 sp": (2, {"tensor": 2, "sequence": True}),
    "dynamic cp4": (4, {"context": 4, "context_ulysses": 2, "dynamic_context": True, "context_tokens": 300}),
}


@pytest.mark.parametrize("name", mostly(LAYOUTS, "cp2, cut padding", "pp2", "dynamic cp4"))
def test_training_is_the_same_to_the_last_bit(workers, tmp_path, name):
    ranks, layout = LAYOUTS[name]
    packs = [p for pair in zip(demo_packs(6), demo_packs(6, length=256), strict=True) for p in pair]
    if not layout.get("dynamic_context"):
        packs = demo_packs(12)
    found = {}
    for way in ("plain", "ahead"):
        cfg = tiny_run(tmp_path / way, STEPS, **layout)
        cfg.kernels.inputs = way
        cfg.stage.residual_dropout = 0.1
        found[way] = workers.run(trained, cfg, packs, ranks=ranks, fit=True)
    assert [{k: line.get(k) for k in TRACED} for line in found["ahead"][0][0]] == [
        {k: line.get(k) for k in TRACED} for line in found["plain"][0][0]
    ]
    for rank in range(ranks):
        assert set(found["plain"][rank][1]) == {"MainThread"} and not found["plain"][rank][2]
        assert set(found["ahead"][rank][1]) == {"ahead"} and found["ahead"][rank][2]
        assert len(found["ahead"][rank][1]) == len(found["plain"][rank][1])  # none is made that is not taken
    held = {way: [rank[3] for rank in ranks_] for way, ranks_ in found.items()}
    if name in ("cp2, cut padding", "pp2", "tp2 sp", "all gather"):  # each crop comes to the rank that encodes it
        assert sum(held["ahead"]) == held["plain"][0] == held["plain"][1]
        assert (held["ahead"][1] == 0) == (name == "pp2")


def own_crops(inputs) -> None:
    """In place of the model's plan: all crops, counted from the first."""
    from molmo2_nemo.parallel.crops import CropPlan

    every = slice(0, len(inputs.crops)), slice(0, len(inputs.pooling))
    inputs.keep_own_crops(CropPlan(*every, [every], *([None] * 4)), 1)  # type: ignore


def taken(folder: str, ahead: bool, count: int, state: str | None) -> tuple[list[Any], str]:
    """Job: the first micro-batches as training takes them, and the state that a checkpoint would hold then."""
    from molmo2_nemo.model.config import Trainable, preset
    from molmo2_nemo.parallel.context import ContextGroups
    from molmo2_nemo.training.data import TrainingData
    from molmo2_nemo.training.step import MicroBatches
    from molmo2_nemo.training.step_result import StepResult
    from molmo2_nemo.training.step_statistics import Tasks
    from tests.support.pool import start_megatron

    start_megatron()
    model = preset("tiny")
    groups = {1: ContextGroups(None, None, None, None)}
    everything = Trainable(*(True for _ in Trainable.__dataclass_fields__))
    takes = MicroBatches(model, everything, groups, Tasks({}), False, False, plan=own_crops)  # type: ignore
    data = TrainingData(demo_data(folder), 1, 2, model)
    if state is not None:
        data.load(state)
    loader = iter(data.open(50, takes if ahead else None))
    result, found = StepResult(), []
    for _ in range(count):
        inputs = takes.take(loader, result, data.consumed)
        found.append((inputs.input_ids.numpy().copy(), inputs.crops.numpy().copy()))
    if ahead:
        assert data.ahead is not None and data.ahead.look() is not None  # one more is ready, and not in the state
    return found, data.state()


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(itertools.chain(*one), itertools.chain(*other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_what_was_ready_and_not_taken_is_read_again(workers, shards):
    whole, end = workers.run(taken, shards, False, 9, None)[0]
    first, state = workers.run(taken, shards, True, 5, None)[0]
    rest, last = workers.run(taken, shards, True, 4, state)[0]
    assert same(first + rest, whole)
    assert json.loads(last) == json.loads(end)
