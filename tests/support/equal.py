"""Two ways to compute a piece are equal: fp32 within 1e-5, bf16 within two roundings of the exact result, forward and
gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FP32 = 1e-5
BF16 = 2.0**-8  # half a unit in the last place of bf16, relative: one rounding


def assert_equal(
    plain: Callable[..., Any], fast: Callable[..., Any], *tensors: Tensor, chain: bool = False, **options: Any
) -> None:
    """`fast` against `plain`. All floating tensors get gradients; strides are kept. Outputs are weighted with fixed
    random numbers, so that every element's gradient counts.

    fp32: largest difference over the largest value at most 1e-5. In bf16: the difference to plain in fp64
    on the rounded inputs is at most two roundings of the largest value (or as large as plain's own; of a `chain` of
    rounded steps, twice as large). A gradient that is 0 but for rounding is measured by a hundredth of the largest.
    """
    exact = _run(plain, [_as(t, torch.float64) for t in tensors], options)
    floor = max(1e-30, *(0.01 * float(t.abs().max()) for t in exact if t.numel()), 0.0)
    for a, b in zip(exact, _run(fast, list(tensors), options), strict=True):
        assert_close(a, b, FP32, floor)
    low = [_as(t, torch.bfloat16) for t in tensors]
    exact = _run(plain, [_as(t, torch.float64) for t in low], options)
    for a, p, b in zip(exact, _run(plain, low, options), _run(fast, low, options), strict=True):
        assert p.dtype == b.dtype
        assert_close(a, b, max(2 * BF16, (2 if chain else 1) * error(a, p, floor)), floor)


def assert_close(exact: Tensor, got: Tensor, bound: float, floor: float = 1e-30) -> None:
    assert exact.shape == got.shape
    assert error(exact, got, floor) <= bound, f"{error(exact, got, floor):.2e} > {bound:.2e}"


def error(exact: Tensor, got: Tensor, floor: float = 1e-30) -> float:
    """Largest difference over the largest exact value, or over `floor` where that is more."""
    if not exact.numel():
        return 0.0
    top = exact.double().abs().max().clamp(min=floor)
    return float((exact.double() - got.double()).abs().max() / top)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in another dtype, with the same strides; others as they are."""
    if not tensor.is_floating_point():
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype).copy_(tensor)


def _run(function: Callable[..., Any], tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Outputs, then gradients of all floating tensors."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    outputs = function(*leaves, **options)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    wanted = [t for t in leaves if t.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, weights)]
