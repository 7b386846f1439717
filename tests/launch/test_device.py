"""What is asked of a machine that it cannot compute is refused before a folder is made or anything is loaded."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
import torch

from molmo2_nemo.cli.main import main
from molmo2_nemo.fused.choice import PIECES
from molmo2_nemo.launch.device import ANYWHERE, Asked, device_problems, problems_here
from molmo2_nemo.model.config import KernelConfig
from molmo2_nemo.settings.compose import compose

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
IMPOSSIBLE = {  # without a GPU: setting -> what is said of it
    "kernels.flash=fa3": "kernels.flash=fa3: it is for GPUs, not for cpu",
    "kernels.flash=cudnn": "kernels.flash=cudnn: it is for GPUs, not for cpu",
    "model.attention=flex": "model.attention=flex: FlexAttention has no backward pass on cpu",
    "cluster.precision=fp8": "cluster.precision=fp8: needs a Hopper GPU (H100) or a newer one, and there is no GPU",
}


def words(shards, folder, *more):
    small = [f"data.sources.demo.path={shards}/sft", f"output_dir={folder}", "stage.max_steps=1"]
    return ["train", "recipe=tiny", "stage=sft", "parallel=single", *small, *more]


@without_gpu
def test_the_command_refuses_all_of_it_at_once_and_writes_nothing(molmo2, shards, tmp_path):
    """Beside a setting that cannot work anywhere, in the list of those."""
    asked = ["kernels.flash=fa3", "model.attention=flex", "cluster.precision=fp8", "save_every=0"]
    call = [*molmo2, *words(shards, tmp_path / "run", *asked)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "4 settings cannot work:" in done.stderr and "save_every=0: must be at least 1" in done.stderr
    for said in asked[:3]:
        assert IMPOSSIBLE[said] in done.stderr
    assert list(tmp_path.iterdir()) == []


@without_gpu
def test_a_process_that_torchrun_started_refuses_it_too(molmo2, shards, tmp_path):
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    call = [*molmo2, *words(shards, tmp_path / "run", "kernels.flash=cudnn")]
    done = subprocess.run(call, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and IMPOSSIBLE["kernels.flash=cudnn"] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_machine_that_submits_is_not_asked(shards, tmp_path, capsys):
    """A login node has no GPU: the job's tasks look for themselves."""
    slurm = ["cluster=slurm", "cluster.nodes=1", "cluster.devices=1", "cluster.precision=bf16", "--dry-run"]
    assert main(words(shards, tmp_path / "run", "kernels.flash=fa3", *slurm)) == 0
    assert "srun" in capsys.readouterr().out


def test_every_way_that_some_machine_lacks_is_looked_at():
    """By the table of ways: one that is passed over runs wherever there is a CPU or a GPU."""
    for piece, hint in get_type_hints(KernelConfig).items():
        for way in get_args(hint):
            special = Asked.by(compose(["recipe=tiny", f"kernels.{piece}={way}"])).special
            assert special == (way not in ANYWHERE)
            if not special and way != "auto":
                assert PIECES[piece][way].problem("cpu", torch.float32) is None
                assert PIECES[piece][way].problem("cuda", torch.bfloat16) is None
    assert not Asked.by(compose(["recipe=8b", "stage=long", "kernels=plain"])).special


def test_what_can_run_is_not_refused():
    asked = ["kernels.adamw=fused", "kernels.loss=fused", "kernels.inputs=ahead", "model.attention=flash"]
    assert list(device_problems(compose(["recipe=tiny", *asked]))) == []


@without_gpu
@pytest.mark.parametrize("setting", IMPOSSIBLE)
def test_each_is_named(setting):
    (said,) = problems_here(Asked.by(compose(["recipe=tiny", setting])))
    assert said.startswith(IMPOSSIBLE[setting])


def test_a_process_that_dies_while_it_looks_is_said(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (said,) = device_problems(compose(["recipe=tiny", "kernels.flash=fa3"]))
    assert "whether this machine can run kernels.flash=fa3 was not found out" in said and "exit code 1" in said


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_that_is_not_installed():
    (said,) = device_problems(compose(["recipe=tiny", "log.wandb=mine"]))
    assert said.startswith("log.wandb=mine: the package wandb is not installed")


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed")
def test_mlflow_that_is_not_installed():
    (said,) = device_problems(compose(["recipe=tiny", "log.mlflow=mine"]))
    assert said == "log.mlflow=mine: the package mlflow is not installed; pip install mlflow, or log.mlflow=null"
