"""Data-parallel communication beside computation: the same numbers as without, in buckets sent in one order."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.support.packs import demo_packs, text_only, tiny_run, train_on_packs
from tests.support.thorough import thorough

TRACED = ("loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm")
BUCKET = 20_000  # parameters: some 20 buckets in the tiny model


def train_watched(cfg: Any, packs: list[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`train_on_packs` in small buckets: the metrics, and what overlapped."""
    from molmo2_nemo.nemo import recipes
    from molmo2_nemo.training import gradients, overlap

    overlapped, install, finalize = recipes.overlapped, overlap.install, gradients.finalize_model_grads
    seen: dict[str, Any] = {"groups": 0, "orders": [[]], "early": [], "gathering": [], "uncovered": 0}
    chunks: list[Any] = []

    def watch_start(number: int, start: Any) -> Any:
        def started(**options: Any) -> None:
            seen["orders"][-1].append(number)
            start(**options)

        return started

    def installed(chunk: Any) -> None:
        chunks.append(chunk)
        seen["groups"] = len(chunk.bucket_groups)
        for number, group in enumerate(chunk.bucket_groups):
            group.start_grad_sync = watch_start(number, group.start_grad_sync)
        install(chunk)
        waited = {id(group) for _, groups in overlap.parts(chunk) for group in groups}
        seen["uncovered"] += len({id(group) for group in chunk.bucket_groups} - waited)

    def finalized(*args: Any, **options: Any) -> None:
        seen["early"].append(sum(group.grad_reduce_handle is not None for group in chunks[0].bucket_groups))
        seen["gathering"].append(sum(group.param_gather_handle is not None for group in chunks[0].bucket_groups))
        finalize(*args, **options)
        seen["orders"].append([])

    recipes.overlapped = lambda cfg, machine: {**overlapped(cfg, machine), "bucket_size": BUCKET}
    overlap.install, gradients.finalize_model_grads = installed, finalized
    try:
        return train_on_packs(cfg, packs), seen
    finally:
        recipes.overlapped, overlap.install, gradients.finalize_model_grads = overlapped, install, finalize


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        thorough(2, {"data": 2}),
        (2, {"context": 2}),
        thorough(4, {"pipeline": 2, "data": 2}),
        (4, {"tensor": 2, "sequence": True, "data": 2, "memory": {"recompute": "full"}}),
    ],
)
def test_the_same_numbers_with_and_without_overlap(workers, tmp_path, ranks, layout):
    """On one rank a micro-batch without crops comes last, so the encoder's gradients come in another order there."""
    packs = demo_packs(12)
    packs = [text_only(pack) if number in (3, 5, 7) else pack for number, pack in enumerate(packs)]
    curves = []
    for name, on in (("plain", False), ("overlap", True)):
        cfg = tiny_run(tmp_path / name, 3, overlap_grad_reduce=on, overlap_param_gather=on, **dict(layout))
        results = workers.run(train_watched, cfg, packs, ranks=ranks, fit=True)
        curves.append([step[key] for step in results[0][0] for key in TRACED])
    assert curves[1] == pytest.approx(curves[0], rel=1e-9)  # norms are added up over other shards
    for rank, (_, seen) in enumerate(results):
        groups, orders = seen["groups"], [order for order in seen["orders"] if order]
        assert orders == [list(range(groups))] * 3
        assert seen["uncovered"] == 0
        if layout.get("pipeline", 1) == 1 or rank < 2:  # Megatron makes one bucket of every further stage
            assert groups > 5
        assert seen["early"][1:] == [groups] * 2, "not all buckets were on their way when backward ended"


def test_a_run_with_overlap_resumes_without_and_back(workers, tmp_path):
    packs, curves = demo_packs(12), []
    for folder, parts in (("whole", ((4, False),)), ("parts", ((2, True), (3, False), (4, True)))):
        cfg = tiny_run(tmp_path / folder, 4, data=2)
        cfg.stage.optim.final_lr_fraction = 1.0  # else the schedule would depend on the number of steps
        for cfg.stage.max_steps, on in parts:
            cfg.parallel.overlap_grad_reduce = cfg.parallel.overlap_param_gather = on
            curves.append(workers.run(train_watched, cfg, packs, ranks=2, fit=True)[0][0])
    whole, parts = ([m[key] for m in curve for key in TRACED] for curve in (curves[0], curves[-1]))
    assert parts == pytest.approx(whole, rel=1e-9)


@dataclasses.dataclass(eq=False)
class Group:
    """What InOrder sees of Megatron's bucket groups."""

    number: int
    started: list[int]
    is_first_batch: bool = False
    grad_reduce_handle: Any = None
    golden_per_param_grad_ready_counts: dict[str, int] = dataclasses.field(default_factory=lambda: {"a": 1})
    per_param_grad_ready_counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def start_grad_sync(self, **options: Any) -> None:
        self.started.append(self.number)
        self.grad_reduce_handle = options


def test_buckets_are_sent_in_order_whatever_order_they_are_ready_in():
    from molmo2_nemo.training.overlap import InOrder

    started: list[int] = []
    groups = [Group(number, started) for number in range(4)]
    reductions = InOrder(groups)
    for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
        for number in order:
            groups[number].start_grad_sync(force_all_reduce=False)
        reductions.start_rest()
        assert started == [0, 1, 2, 3]
        started.clear()
        for group in groups:
            group.grad_reduce_handle = None
    groups[1].start_grad_sync()
    groups[3].start_grad_sync()
    reductions.start_rest()  # 0 and 2 got no gradient
    assert started == [0, 1, 2, 3]
    groups[2].per_param_grad_ready_counts = {"a": 2}
    with pytest.raises(RuntimeError, match="overlap_grad_reduce=false"):
        reductions.start_rest()
