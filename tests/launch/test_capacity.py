"""Runs that this machine has no memory or no devices for are refused before anything is loaded, with what would fit."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.cost.parameters import held
from molmo2_nemo.launch.capacity import Machine, capacity_problems, needed, offloaded, what_fits
from molmo2_nemo.model.config import preset
from molmo2_nemo.plan.memory import GIB
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.run import RunConfig

LAPTOP = Machine((), 16 * GIB)
H100, H200, SMALLER = 79.65 * GIB, 139.8 * GIB, 24 * GIB


def problems(cfg: RunConfig, here: Machine, processes: int | None = None) -> str:
    return "\n".join(capacity_problems(cfg, processes, here))


def test_the_tiny_recipe_runs_on_a_laptop():
    assert not problems(compose(["recipe=tiny", "parallel=cp2"]), LAPTOP)


@pytest.mark.parametrize("words", [["scale=gpu_lora", "stage=sft"], ["cluster=gpu", "stage=long"]])
def test_a_big_recipe_without_a_gpu(words):
    cfg = compose(["recipe=4b", *words])
    said = problems(cfg, LAPTOP)
    assert "no GPU here" in said and "16 GiB are free" in said and "recipe=tiny" in said and "molmo2 plan" in said
    count = cfg.parallel.model_size * cfg.parallel.data
    bytes_ = re.search(r"at least ([\d,]+) GiB", said)
    assert bytes_ and int(bytes_[1].replace(",", "")) == round(count * needed(cfg, gpu=False) / GIB) > 16
    assert not problems(cfg, replace(LAPTOP, host=2**45))  # a server that has it may
    cfg.cluster.check_memory = False
    assert not problems(cfg, LAPTOP)


def test_without_a_gpu_settings_that_fit_are_named():
    """A server with some memory: the settings are accepted then, and without the last of them not."""
    words = ["recipe=4b", "scale=gpu_lora", "stage=sft"]
    here = Machine((), 23 * GIB)
    said = problems(compose(words), here)
    named = what_fits(compose(words), here.host, gpu=False)
    assert named and f"By the planner this fits: {' '.join(named)};" in said and "memory.offload" not in said
    assert not problems(compose([*words, *named]), here)
    assert problems(compose([*words, *named[:-1]]), here)
    assert "No setting of memory.* makes it fit; recipe=tiny runs here" in problems(compose(words), LAPTOP)


@pytest.mark.parametrize(
    ("words", "here"),
    [
        (["recipe=4b", "scale=gpu_lora", "stage=sft", "memory.mlp_tiles=4"], LAPTOP),
        (["recipe=4b", "scale=gpu", "stage=sft", "memory.offload=true"], LAPTOP),
        (["recipe=4b", "scale=gpu", "stage=sft"], Machine((H100,), 2**38)),
        (["recipe=4b", "scale=node", "stage=sft"], Machine((H200,) * 2, 2**38)),
    ],
    ids=str,
)
def test_the_plan_that_is_named_is_of_this_run(words, here, capsys):
    """It can be run, on the GPUs that are here or on those that the scale is for, and has the scale's settings."""
    cfg = compose(words)
    said = re.search(r"molmo2 (plan .*? cluster=\w+)", problems(cfg, here))
    assert said
    asked = shlex.split(said[1])
    assert asked[1:-1] == [w for w in words if w != "scale=node"]  # which changes nothing that a plan reads
    gpus = {0: {"gpu_lora": "h100x1", "gpu": "h200x1"}, 1: {"gpu": "h100x1"}, 2: {"node": "h200x2"}}
    assert asked[-1] == f"cluster={gpus[len(here.gpus)][words[1].removeprefix('scale=')]}"
    code = main(asked)
    assert code == 0


def test_an_optimizer_on_the_host_needs_its_memory():
    words = ["recipe=4b", "stage=sft", "scale=gpu", "memory.recompute=full"]
    cfg = compose([*words, "memory.optimizer_offload=true"])
    plain, trained = compose(words), 16 * held(preset("4b"), cfg.stage, 1, 1).trained
    assert needed(plain, gpu=True) - needed(cfg, gpu=True) == pytest.approx(1.05 * 12 / 16 * trained, rel=1e-6)
    said = problems(cfg, Machine((H200,), 12 * GIB))
    assert f"memory.optimizer_offload=true keeps {trained / GIB:.0f} GiB on this node's host for 1 process;" in said
    assert "12 GiB are free" in said and not problems(cfg, Machine((H200,), 2**38))
    room = needed(cfg, gpu=True) * 1.01
    assert "memory.optimizer_offload=true" in what_fits(plain, room, host=2**38)
    assert "memory.optimizer_offload=true" not in what_fits(plain, room, host=GIB)


def test_a_tiny_run_that_is_too_big_is_not_told_to_be_tiny():
    cfg = compose(["recipe=tiny", "stage=long", "data.packing.sequence_length=99999999"])
    said = problems(cfg, LAPTOP)
    assert "recipe=tiny" not in said.split("molmo2 plan")[0] and "shorter packs take less" in said


def test_scales_fit_the_gpus_they_are_for():
    for stage in ("pretrain", "sft", "long"):
        for scale, room in (("gpu_lora", H100), ("gpu", H200)):
            assert not problems(compose(["recipe=4b", f"scale={scale}", f"stage={stage}"]), Machine((room,), 2**38))


@pytest.mark.parametrize(
    ("words", "room"),
    [(["scale=gpu", "memory.recompute=none"], H200), (["scale=gpu_lora", "memory.recompute=none"], H100)],
)
def test_too_little_memory_of_a_gpu_names_settings_that_fit(words, room):
    cfg = compose(["recipe=4b", "stage=sft", *words])
    said = problems(cfg, Machine((room,), 2**38))
    assert f"{room / GIB:.0f} GiB are here" in said and "cluster.check_memory=false" in said
    named = what_fits(cfg, room)
    assert named and " ".join(named) in said
    assert not problems(compose(["recipe=4b", "stage=sft", *words, *named]), Machine((room,), 2**38))
    assert problems(compose(["recipe=4b", "stage=sft", *words, *named[:-1]]), Machine((room / 1.1,), 2**38))


def test_where_no_setting_helps_the_smaller_scales_are_named():
    said = problems(compose(["recipe=4b", "stage=sft", "scale=gpu"]), Machine((SMALLER,), 2**38))
    assert "No setting of memory.* makes it fit" in said and "scale=gpu_lora" in said


def test_more_processes_than_gpus():
    cfg = compose(["recipe=4b", "stage=sft", "scale=node"])
    assert "takes 8 GPUs on this node, here: 2" in problems(cfg, Machine((H100,) * 2, 2**38))
    assert not problems(cfg, Machine((H100,) * 8, 2**38))
    cfg = compose(["recipe=4b", "stage=sft", "cluster=slurm"])  # a task of many nodes' job asks for its own node
    assert not problems(cfg, Machine((H100,) * 8, 2**38), processes=8)


def test_offload_needs_the_hosts_memory():
    words = ["recipe=4b", "stage=long", "scale=gpu", "memory.recompute=full", "memory.offload=true"]
    cfg = compose(words)
    layer = 36864 * (2 * 2560 + (2 * 128 + 4) * 32)  # input, attention's output and log-sum-exp
    assert 36 * layer < offloaded(cfg) < 1.05 * 36 * layer
    said = problems(cfg, Machine((H200,), 12 * GIB))
    assert "memory.offload=true keeps at least 17 GiB of pinned memory" in said and "of which 12 GiB are free" in said
    assert "recompute_attention=true needs less" in said
    assert not problems(compose([*words, "memory.recompute_attention=true"]), Machine((H200,), 12 * GIB))
    assert not problems(cfg, Machine((H200,), 18 * GIB))
    for recompute in ("none", "selective"):  # all of a layer waits
        assert offloaded(compose([*words, f"memory.recompute={recompute}"])) >= offloaded(cfg)
    cfg = compose(words[:3])
    assert offloaded(cfg) == 0
    named = what_fits(cfg, 0.5 * needed(compose(words), gpu=True), host=GIB)
    assert "memory.offload=true" not in named


def test_the_command_says_so_before_it_loads_anything(molmo2, shards, tmp_path):
    import subprocess

    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = ["recipe=8b", "stage=long", "scale=node", "data.missing=skip", f"output_dir={tmp_path / 'run'}"]
    words += [f"data.sources.mine.path={shards}/long", "data.tokenizer=tiny"]
    done = subprocess.run([*molmo2, "train", *words], capture_output=True, text=True)
    assert done.returncode == 2 and re.search(r"no GPU here.*at least 5\d\d GiB", done.stderr), done.stderr
    assert not (tmp_path / "run").exists()
