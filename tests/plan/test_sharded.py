"""Plans with parameters sharded by Megatron-FSDP: bytes by hand, and where they are found."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.cost.hardware import parse_cluster
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.parameters import held, parameters
from molmo2_nemo.cost.step import step_time
from molmo2_nemo.cost.workload import workload
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import preset
from molmo2_nemo.plan.memory import memory
from molmo2_nemo.plan.search import search, unplaced
from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.compose import compose

RANKS = 8
LAYOUT = Layout(context=4, ulysses=4, data=2, recompute="full", fsdp=True)


@pytest.fixture(scope="module")
def run():
    """A run in which everything is trained."""
    return compose(["recipe=8b", "stage=long", "stage.train_base_embedding=true"])


def test_a_rank_holds_its_share_and_what_is_whole_for_a_while(run):
    model, work = preset("8b"), workload(run)
    p = parameters(model)
    layers, outside = p.layer * p.layers, p.total - p.layer * p.layers
    assert held(model, run.stage, 1, 1).trained == p.total
    found, whole = (memory(model, run.stage, work, replace(LAYOUT, fsdp=fsdp)) for fsdp in (True, False))
    assert found.weights == pytest.approx(2 * (p.total / RANKS + outside + 2 * p.layer))
    largest = max(3 * p.layer, p.embedding)
    assert found.gradients == pytest.approx(4 * p.total / RANKS + 2 * outside + 4 * largest)
    assert found.optimizer == whole.optimizer == pytest.approx(12 * p.total / RANKS)
    assert found.weights < whole.weights / 2 and found.gradients < whole.gradients / 2 and layers > outside


def test_bytes_that_a_step_sends(run):
    """Eight packs on two replicas: in each of four micro-batches two gathers of the layers and a reduction of all."""
    model, work, cluster = preset("8b"), replace(workload(run), packs=8), parse_cluster("h100x8", 1)
    p = parameters(model)
    layers = p.layer * p.layers
    sent = [step_time(model, run.stage, work, cluster, replace(LAYOUT, fsdp=fsdp)).link_bytes for fsdp in (True, False)]
    sharded = (RANKS - 1) / RANKS * (4 * (2 * 2 * layers + 4 * p.total) + 2 * (p.total - layers))
    assert sent[0] - sent[1] == pytest.approx(sharded - (RANKS - 1) / RANKS * (4 + 2) * p.total)


def test_the_plan_that_is_asked_for(capsys):
    """Two H100 and stage 3 of the 4B: a layout that the checks of training take."""
    words = ["recipe=4b", "stage=long", "scale=node", "cluster=h100x2"]
    assert main(["plan", *words, "parallel.fsdp=megatron"]) == 0
    out = capsys.readouterr().out
    assert "full, FSDP" in out and "parallel.fsdp=megatron" in out and "66" in out and "full, offload" not in out
    cfg = compose([*words[:3], "parallel.fsdp=megatron"])
    found = search(cfg, preset("4b"), workload(cfg), parse_cluster("h100x2", 1))
    assert found.best and all(c.layout.fsdp and c.layout.may_shard for c in found.best)
    trained = compose([*words[:3], *found.best[0].layout.settings.split()])
    assert [p for p in find_problems(trained, 2) if "data." not in p.split("=")[0]] == []


def test_nobody_to_share_with(capsys):
    words = ["recipe=4b", "stage=long", "scale=gpu", "parallel.fsdp=megatron"]
    cfg = compose(words)
    with pytest.raises(UserError, match="shares parameters among several GPUs"):
        search(cfg, preset("4b"), workload(cfg), parse_cluster("h100x1", 1))
    assert "does not go with" in (unplaced(cfg, workload(cfg), parse_cluster("h100x1", 1)) or "")
    assert main(["plan", *words[:3], "cluster=h100x1", "--json"]) == 0
    assert "fsdp" not in json.dumps(json.loads(capsys.readouterr().out)["best"])


def test_where_nothing_else_fits_the_faster_of_two_is_taken():
    """FSDP or the optimizer on the host; a layout has never both."""
    cfg = compose(["recipe=8b", "stage=long", "scale=node"])
    found = search(cfg, preset("8b"), workload(cfg), parse_cluster("h100x4", 1))
    assert all(not (c.layout.fsdp and c.layout.optimizer_offload) for c in found.best)
