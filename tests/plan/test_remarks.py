"""What a plan says besides its numbers, and what it proposes where its settings do not fit."""

from __future__ import annotations

import json

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.compose import compose

EXTEND = ["recipe=longvila", "stage=extend", "cluster=h100x8", "nodes=16"]
LEAN = ["memory.vision_chunk=16", "memory.mlp_tiles=8"]


def planned(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert main(["plan", *words]) == 2
    return capsys.readouterr().err


def test_phases_are_planned_as_the_longest_packs(capsys):
    said = " ".join(planned(capsys, *EXTEND)["remarks"])
    assert "data.progression: every step is planned with the longest packs (262,144 tokens); 40 of 120 have" in said
    assert "never reached" not in said
    said = " ".join(planned(capsys, *EXTEND, "stage.max_steps=40")["remarks"])
    assert "data.packing (packs of 262,144 tokens, after step 40) is never reached" in said


def test_a_chunk_that_holds_a_ranks_share(capsys):
    words = ["recipe=8b", "stage=long", "cluster=h100x8", "memory.recompute=full"]
    found = planned(capsys, *words, "memory.sequence_chunk=36863")
    assert any("memory.sequence_chunk=36863 saves nothing in this layout" in line for line in found["remarks"])
    found = planned(capsys, *words, "memory.sequence_chunk=64")
    assert not any("saves nothing" in line for line in found["remarks"])


@pytest.mark.parametrize("asked", [[], ["memory.optimizer_offload=false"], ["memory={optimizer_offload: false}"]])
def test_what_is_changed_because_nothing_else_fits_is_named(capsys, asked):
    found = planned(capsys, "recipe=4b", "stage=long", "scale=gpu", "cluster=h100x1", *asked)
    last = "nothing fits with memory.optimizer_offload=false: the plan takes memory.optimizer_offload=true"
    assert last in found["remarks"] and "memory.optimizer_offload=true" in found["command"]
    named = "set otherwise than you asked: memory.optimizer_offload=true, not false"
    assert (named in found["remarks"]) == bool(asked)
    found = planned(capsys, "recipe=4b", "stage=long", "scale=gpu", "cluster=h100x2", *asked)
    assert not any("nothing fits with" in line for line in found["remarks"])


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=longvita", "stage=long1m", "cluster=h100x8", "nodes=16"],  # two tensor ranks, by the recipe
        ["recipe=4b", "stage=long", "scale=gpu", "cluster=h100x2"],  # one process, by the scale
    ],
    ids=["longvita", "gpu"],
)
def test_fsdp_needs_no_layout_of_the_recipes(capsys, words):
    """The plan chooses a layout that goes with it, as the checks of training say."""
    found = planned(capsys, *words, "parallel.fsdp=megatron")
    run = compose(found["command"][2:])
    assert (run.parallel.fsdp, run.parallel.tensor, run.parallel.sequence) == ("megatron", 1, False)
    assert list(find_problems(run, files=False)) == []


def test_a_layout_that_was_asked_for_beside_fsdp_is_refused(capsys):
    words = ["recipe=longvita", "stage=long1m", "cluster=h100x8", "nodes=16", "parallel.fsdp=megatron"]
    remedy = "set parallel.tensor=1 parallel.sequence=false, or parallel.fsdp=none"
    assert remedy in refused(capsys, *words, "parallel.tensor=2")
    assert "parallel.pipeline=2" in refused(capsys, *words, "parallel.pipeline=2")
    assert "memory.offload=true: the two" in refused(capsys, *words, "memory.offload=true")


def test_what_would_fit_looks_at_everything_that_a_plan_chooses(capsys):
    """More nodes with the optimizer on the host, as a plan for them then says; and no FSDP, where it is in the way."""
    words = ["recipe=8b", "stage=sft", "cluster=l40sx1", *LEAN]
    said = refused(capsys, *words)
    assert "host optimizer) needs" in said and "nodes=2 would do" in said
    assert "memory.optimizer_offload=true" in planned(capsys, *words, "nodes=2")["command"]
    words = ["recipe=8b", "stage=long", "cluster=h100x2", *LEAN]
    assert "parallel.fsdp=none, or nodes=2 would do" in refused(capsys, *words, "parallel.fsdp=megatron")
    assert "parallel.fsdp=megatron" not in planned(capsys, *words)["command"]
