"""The CPU shims: what they change without CUDA, and that they change nothing with it."""

from __future__ import annotations

import pytest
import torch


def stand_ins_job() -> dict:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.empty(1, device=torch.cuda.current_device()).device.type)
            return grad * torch.full((2,), 2.0, device="cuda")

    seen: list[str] = []
    x = torch.ones(2, requires_grad=True)
    Doubled.apply(x).sum().backward()
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.cuda.manual_seed(5)
    with torch.cuda.stream(torch.cuda.Stream()):
        again = torch.rand(1)
    return {
        "backward": seen,
        "grad": x.grad.tolist(),
        "devices": [
            torch.zeros(1, device="cuda").device.type,
            torch.zeros(1, device=0).device.type,
            torch.ones(1).to("cuda").device.type,
            torch.ones(1).cuda().device.type,
            torch.tensor(1.0, pin_memory=True).device.type,
        ],
        "type": torch.ones(1).type(),
        "same seed": bool(first == again),
        "available": torch.cuda.is_available(),
    }


def test_asking_for_cuda_gives_the_cpu(workers):
    got = workers.run(stand_ins_job)[0]
    assert got["backward"] == ["cpu"] and got["grad"] == [2.0, 2.0]
    assert set(got["devices"]) == {"cpu"}
    assert got["type"] == "torch.FloatTensor"  # only Megatron's optimizer is told another one
    assert got["same seed"] and not got["available"]


def test_nothing_changes_where_there_is_cuda(monkeypatch):
    from molmo2_nemo import cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "Stream", "manual_seed")}
    tensor_cuda, backward = torch.Tensor.cuda, torch.autograd._engine_run_backward
    assert cpu.enable(threads=3) is False
    cpu.enable_megatron()
    assert before == {name: getattr(torch.cuda, name) for name in before}
    assert torch.Tensor.cuda is tensor_cuda and torch.autograd._engine_run_backward is backward


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, torch.device("cuda", 2)])
def test_cuda_devices_are_recognised(device):
    from molmo2_nemo.cpu import _is_cuda_device

    assert _is_cuda_device(device)
    for other in ("cpu", None, torch.device("cpu"), True, "meta"):
        assert not _is_cuda_device(other)
