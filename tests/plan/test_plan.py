"""Plans: the published figures come out, the best layout is one that trains, and what cannot fit is refused."""

from __future__ import annotations

import json

import pytest

from molmo2_nemo.cli.checks import find_problems
from molmo2_nemo.cli.main import main
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import preset
from molmo2_nemo.plan.hardware import DEVICES, parse_cluster
from molmo2_nemo.plan.layout import Layout, layouts
from molmo2_nemo.plan.memory import GIB, USABLE, memory
from molmo2_nemo.plan.published import HOURS, published_gpu_hours
from molmo2_nemo.plan.rates import FLASH
from molmo2_nemo.plan.search import candidates, search
from molmo2_nemo.plan.speed import step_time
from molmo2_nemo.plan.workload import averages, workload
from molmo2_nemo.settings.compose import compose


@pytest.mark.parametrize("name", HOURS)
def test_published_hours_come_out(name):
    """Stage 3 as the paper ran it, 128 H100: within a quarter."""
    work = workload(compose([f"recipe={name}", "stage=long"]))
    hours = published_gpu_hours(preset(name), work, parse_cluster("h100x8", 16))
    assert hours == pytest.approx(HOURS[name] * 128, rel=0.25)


def plan(name="8b", stage="long", cluster="h100x8", nodes=16, *extra):
    cfg = compose([f"recipe={name}", f"stage={stage}", *extra])
    return cfg, search(cfg, preset(name), workload(cfg), parse_cluster(cluster, nodes))


@pytest.mark.parametrize(("name", "stage"), [("4b", "sft"), ("8b", "long"), ("o7b", "long"), ("8b", "pretrain")])
def test_best_layouts_pass_the_checks_of_training(name, stage):
    cfg, found = plan(name, stage)
    for candidate in found.best:
        layout = candidate.layout
        assert candidate.fits(found.cluster)
        assert layout.model_size * layout.data == 128
        trained = compose([f"recipe={name}", f"stage={stage}", *layout.settings.split()])
        problems = [p for p in find_problems(trained, 128) if "data." not in p.split("=")[0]]
        assert problems == []
    seconds = [c.step.seconds for c in found.best]
    assert seconds == sorted(seconds)
    every = candidates(cfg, preset(name), found.work, found.cluster, None)
    assert seconds[0] == min(c.step.seconds for c in every if c.fits(found.cluster))


def test_every_other_layout_has_a_true_reason():
    _, found = plan("8b", "long", "h100x8", 4)
    assert len(found.others) > 5
    for candidate, why in found.others:
        if why.startswith("needs"):
            assert candidate.memory.total > USABLE * 79.2 * GIB
        else:
            assert candidate.step.seconds > found.best[0].step.seconds
            assert why.startswith(f"{candidate.step.seconds / found.best[0].step.seconds - 1:.0%} slower")


def test_components_move_as_they_must():
    cfg = compose(["recipe=8b", "stage=long"])
    model, work, cluster = preset("8b"), workload(cfg), parse_cluster("h100x8", 16)

    def step(**kw):
        return step_time(model, cfg.stage, work, cluster, Layout(**kw))

    def need(**kw):
        return memory(model, cfg.stage, work, Layout(**kw), cfg.memory)

    one, eight = need(data=128), need(context=8, ulysses=8, data=16)
    assert eight.decoder == pytest.approx(one.decoder / 8) and eight.vision == pytest.approx(one.vision / 8)
    assert eight.weights == one.weights and eight.optimizer == one.optimizer  # sharded over data x context
    assert need(tensor=2, data=64).gradients < 0.6 * one.gradients
    assert need(data=128, recompute="full").decoder < 0.2 * one.decoder
    assert step(data=128).recompute == 0 < step(data=128, recompute="selective").recompute
    assert step(data=16, pipeline=8).bubble > step(data=32, pipeline=4).bubble > step(data=128).bubble == 0
    assert step(data=128).imbalance > step(data=64, tensor=2).imbalance  # two micro-batches each can be dealt
    fast = step_time(model, cfg.stage, work, cluster, Layout(data=128), FLASH)
    assert fast.attention < 0.5 * step(data=128).attention and fast.linear == step(data=128).linear
    assert step(data=128).flops.total == step(context=8, ulysses=8, data=16).flops.total


def test_layouts_are_those_that_divide():
    cluster, model = parse_cluster("h100x8", 2), preset("8b")
    found = list(layouts(model, cluster, 128, 36864))
    assert len(set(found)) == len(found) > 50
    assert all(x.model_size * x.data == 16 and 128 % (x.data * x.micro_batch) == 0 for x in found)
    assert {x.context // x.ulysses for x in found if x.context * x.tensor == 16} == {2}


def test_averages_between_the_known_lengths():
    assert averages(36864)[2] == averages(80000)[2] == 0.397
    assert averages(100) == averages(2536)
    assert averages(16384)[2] < averages(26000)[2] < averages(36864)[2]


def test_what_cannot_fit_is_refused_with_what_would():
    with pytest.raises(UserError, match=r"does not fit on 1 node of 1 L40S.* needs \d+ GiB per GPU .*has 44.*nodes="):
        plan("8b", "long", "l40sx1", 1)
    with pytest.raises(UserError, match="No number of nodes"):
        plan("8b", "long", "l40sx1", 1, "data.packing.sequence_length=9437184", "stage.global_batch_size=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster=h100"], "expected GPU and number per node"),
        (["cluster=h100x8", "nodes=many"], "nodes=many: expected a whole number"),
        (["cluster=h300x8"], "no GPU 'h300'; did you mean"),
        (["nodes=0"], "at least one"),
        (["--area", "3"], "expected a share"),
        (["nodes=3"], "no layout of the 8b model divides 128 packs"),
    ],
)
def test_bad_input(capsys, arguments, message):
    assert main(["plan", "recipe=8b", "stage=long", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_command(capsys):
    assert main(["plan", "recipe=8b", "stage=long", "cluster=h100x8", "nodes=16"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "attention, by mask area" in out and "Its paper reports 3,328 on 128 H100" in out
    assert main(["plan", "recipe=8b", "stage=long", "cluster=h100x8", "nodes=16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["best"][0]
    assert best["seconds"] == pytest.approx(sum(best["step_seconds"].values()))
    assert sum(best["memory_gib"].values()) < DEVICES["h100"].memory
