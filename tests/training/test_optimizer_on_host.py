"""Megatron's optimizer on the host (`memory.optimizer_offload`), on a CPU that takes the model's own buffers for a GPU:
update, clipping and checkpoints are those of the optimizer beside the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo2_nemo.settings.run import RunConfig
from tests.support.packs import demo_packs, tiny_run, train_on_packs

STEPS = 3


@contextlib.contextmanager
def model_as_if_on_a_gpu() -> Iterator[None]:
    """`is_cuda` of what lies in the buffers of Megatron's DistributedDataParallel; of nothing else."""
    from megatron.core.distributed import param_and_grad_buffer

    buffers, original = set[int](), param_and_grad_buffer._ParamAndGradBuffer.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        buffers.update(t.untyped_storage().data_ptr() for t in (self.param_data, self.grad_data) if t is not None)

    def is_cuda(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in buffers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(param_and_grad_buffer._ParamAndGradBuffer, "__init__", watched)
        patch.setattr(torch.Tensor, "is_cuda", property(is_cuda), raising=False)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
        yield


def trained(cfg: RunConfig, packs: list) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The metrics of every step; and where the optimizer's state is, how it counted, and the sums of its tensors."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from molmo2_nemo.nemo import optimizer

    made, original = [], optimizer.clipping_optimizer

    def watched(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch, model_as_if_on_a_gpu():
        patch.setattr(optimizer, "clipping_optimizer", watched)
        metrics = train_on_packs(cfg, packs)
    inner = made[-1].chained_optimizers[0].optimizer
    states = list(inner.state.values())
    return metrics, {
        "on the host": isinstance(inner, HybridDeviceOptimizer),
        "beside the model": getattr(inner, "gpu_optimizer", None) is not None,
        "steps": {float(state["step"]) for state in states},
        "parameters": len(states),
        "moments": [sum(float(state[name].double().sum()) for state in states) for name in ("exp_avg", "exp_avg_sq")],
    }


def run_of(folder: Path, on_host: bool, data: int = 1) -> RunConfig:
    """One pack a replica and step: bf16 is slow on a CPU."""
    cfg = tiny_run(folder, STEPS, data=data, memory={"optimizer_offload": on_host})
    cfg.stage.global_batch_size = data
    cfg.cluster.precision, cfg.kernels.adamw = "bf16", "fused"  # the AdamW that the host's is
    cfg.stage.optim.final_lr_fraction = 1.0  # else the schedule would depend on the number of steps
    return cfg


def curve(metrics: list[dict[str, Any]]) -> list[list[float]]:
    traced = [key for key in metrics[0] if key.startswith(("loss", "grad_norm", "lr_"))]
    assert len(traced) == 7
    return [[step[key] for key in traced] for step in metrics]


@pytest.fixture(scope="module")
def beside(workers, tmp_path_factory):
    """Curve and state of an optimizer beside the model."""
    cfg = run_of(tmp_path_factory.mktemp("beside"), on_host=False)
    metrics, state = workers.run(trained, cfg, demo_packs(STEPS), fit=True)[0]
    assert not state["on the host"]
    return curve(metrics), state


def test_an_update_on_the_host_is_that_beside_the_model(workers, beside, tmp_path):
    expected, at_model = beside
    metrics, at_host = workers.run(trained, run_of(tmp_path, on_host=True), demo_packs(STEPS), fit=True)[0]
    assert curve(metrics) == expected
    assert at_host["on the host"] and not at_host["beside the model"]
    assert at_host["steps"] == at_model["steps"] == {float(STEPS)}
    assert at_host["parameters"] == at_model["parameters"] > 50
    assert at_host["moments"] == pytest.approx(at_model["moments"], rel=1e-12)


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_resumes_on_the_host_and_back(workers, beside, tmp_path, first):
    """Two steps one way and the rest the other."""
    cfg = run_of(tmp_path, on_host=first)
    for cfg.stage.max_steps, cfg.memory.optimizer_offload in ((2, first), (STEPS, not first)):
        metrics, state = workers.run(trained, cfg, demo_packs(STEPS), fit=True)[0]
        assert state["on the host"] == cfg.memory.optimizer_offload
        assert state["steps"] == {float(cfg.stage.max_steps)}
        assert curve(metrics) == beside[0][: cfg.stage.max_steps]


def test_replicas_share_it(workers, tmp_path):
    found = []
    for on_host in (False, True):
        cfg = run_of(tmp_path / str(on_host), on_host, data=2)
        found.append(workers.run(trained, cfg, demo_packs(2 * STEPS), ranks=2, fit=True))
    beside, at_host = found
    assert [curve(metrics) for metrics, _ in at_host] == [curve(metrics) for metrics, _ in beside]
    assert all(state["on the host"] for _, state in at_host)
    assert [state["moments"] for _, state in at_host] == [
        pytest.approx(state["moments"], rel=1e-12) for _, state in beside
    ]
