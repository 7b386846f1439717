"""Whether a loss curve lies within rounding noise: the rule, on made curves. A run makes real ones."""

from __future__ import annotations

import pytest

from benchmarks.gpu.curve import CONTROL, ORDERS, RATE, SUBJECT, compare, distance, settings, verdict
from molmo2_nemo.settings.compose import compose

EXACT = [7.0, 6.0, 5.0, 4.5]
CPU = {name: [loss + sign * 0.01 for loss in EXACT] for name, sign in (("one", 1), ("two", -1), ("three", 0))}


def test_the_distance_is_the_largest_at_any_step():
    assert distance([1.0, 2.0, 3.0], [1.1, 1.5, 3.0]) == 0.5
    with pytest.raises(ValueError):
        distance([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("off", "within"), [(0.0, True), (0.03, True), (0.05, False), (-0.05, False)])
def test_a_curve_is_held_against_the_spread_of_the_others(off, within):
    found = verdict(CPU, [loss + off for loss in EXACT])
    assert found["noise"] == pytest.approx(0.02) and found["allowed"] == pytest.approx(0.04)
    assert found["within"] == within


def test_a_comparison_that_could_not_fail_says_so():
    subjects, far = {"card": EXACT}, {"higher rate": [loss - 0.2 for loss in EXACT]}
    found = compare({"cpu": CPU, "subjects": subjects, "control": far})
    assert found["within"] and found["separates"]
    found = compare({"cpu": CPU, "subjects": subjects, "control": {"higher rate": EXACT}})
    assert found["within"] and not found["separates"]
    assert not compare({"cpu": CPU, "subjects": far, "control": far})["within"]


def test_one_order_only_is_no_spread():
    assert not verdict({"one": EXACT, "again": EXACT}, [loss + 1e-6 for loss in EXACT])["within"]


@pytest.mark.parametrize("way", [*ORDERS.values(), *SUBJECT.values(), *CONTROL.values()], ids=str)
def test_every_curve_is_a_run_of_the_same_numbers(way, tmp_path):
    cfg = compose([*settings(tmp_path, 20), "cluster.precision=bf16", *way])
    assert cfg.stage.global_batch_size == 4 and cfg.stage.residual_dropout == cfg.stage.response_residual_dropout == 0
    rates = {cfg.stage.optim.vit.lr, cfg.stage.optim.connector.lr, cfg.stage.optim.llm.lr}
    assert rates == ({1.25 * RATE} if way in CONTROL.values() else {RATE})
