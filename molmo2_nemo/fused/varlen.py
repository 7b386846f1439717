"""The libraries under `model.attention=flash` on CUDA: many plain attentions of different lengths in one call.

Each takes tokens of all segments one behind the other, and where segments begin; each returns the output and the
log-sum-exp, and has a backward that takes both, also those of a softmax over more keys than the call's (attention/
flash.py merges calls). They differ in how they lay out the log-sum-exp, and in what they need:

    PyTorch's own   FlashAttention-2; log-sum-exp [N, T]
    fa3             FlashAttention-3 (module flash_attn_interface) on Hopper, put under PyTorch's operators by PyTorch's
                    own registry; log-sum-exp [N, T]
    fa4             FlashAttention-4 (flash_attn.cute) on Hopper and Blackwell, called itself: up to 2.13
                    PyTorch's wrapper takes two results of its forward, late releases return five; log-sum-exp [N, T]
    cudnn           aten._cudnn_attention_forward: log-sum-exp [T, N, 1] up to PyTorch 2.13, later [N, T]

cuDNN builds a plan for each new shape, and up to PyTorch 2.13 its operator for different lengths keeps none of them: it
builds one for every call, for which others saw about half a second (FunASR issue 3704: 0.44 s forward, 0.55 s backward
on a B200, torch 2.11). So `auto` does not take it.

Shape legend: T tokens of the queries, K of the keys, N query heads, G key heads, H head size.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molmo2_nemo.errors import UserError
from molmo2_nemo.fused.cards import LIBRARIES, written_for


@dataclass(frozen=True)
class Lengths:
    """The segments of one call. A causal call has as many keys as queries in every segment: elsewhere libraries differ
    in which corner they align."""

    causal: bool
    query_offsets: Tensor  # int32 [segments + 1]
    key_offsets: Tensor
    longest_query: int
    longest_key: int

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """Offsets and longest segments, in the order in which PyTorch's operators take them."""
        return self.query_offsets, self.key_offsets, self.longest_query, self.longest_key


Forward = Callable[[Tensor, Tensor, Tensor, Lengths, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Lengths, float], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Library:
    """forward(q [T, N, H], k [K, G, H], v, lengths, scale) -> out [T, N, H] in q's dtype, lse fp32 [T, N].

    backward(grad, q, k, v, out, lse, lengths, scale) -> dq, dk, dv in q's dtype. All tensors are contiguous but lse.
    """

    implementation: str  # its name in cost/efficiency.py
    title: str
    forward: Forward
    backward: Backward
    registered: str | None = None  # what PyTorch's registry calls it; None: what PyTorch was built with

    def prepare(self) -> None:
        """Put it under PyTorch's operators, for the whole process, unless it is there."""
        if current_registered() == self.registered:
            return
        from torch.nn import attention

        if self.registered is None:
            attention.restore_flash_attention_impl()
        else:
            attention.activate_flash_attention_impl(self.registered)


def current_registered() -> str | None:
    """What is under PyTorch's flash operators; None: what PyTorch was built with."""
    from torch.nn import attention

    current = getattr(attention, "current_flash_attention_impl", None)  # absent before PyTorch 2.11
    return None if current is None else current()


def _heads_first(lse: Tensor) -> Tensor:
    """[T, N] -> [N, T], contiguous."""
    return lse.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *lengths.arguments,
        0.0,
        lengths.causal,
        return_debug_mask=False,
        scale=scale,
    )
    return out, lse.transpose(0, 1)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the generator's state: there is no dropout
    return torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        _heads_first(lse),
        *lengths.arguments,
        0.0,
        lengths.causal,
        unused,
        unused,
        scale=scale,
    )


@functools.cache
def _fa4() -> Any:
    return importlib.import_module("flash_attn.cute.interface")


def _fa4_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _fa4()._flash_attn_fwd(
        q, k, v, softmax_scale=scale, causal=lengths.causal, return_lse=True, **_fa4_lengths(lengths)
    )
    return out, lse.transpose(0, 1)


def _fa4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv, *_ = _fa4()._flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad,
        _heads_first(lse),
        softmax_scale=scale,
        causal=lengths.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_fa4_lengths(lengths),
    )
    return dq, dk, dv


def _fa4_lengths(lengths: Lengths) -> dict[str, Any]:
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths.arguments, strict=True))


HEADS_FIRST: set[bool] = set()  # whether cuDNN's log-sum-exp is [N, T] in this PyTorch, once a forward has shown it


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    _check_offsets(q)
    _check_offsets(k)
    out, lse, *_ = torch.ops.aten._cudnn_attention_forward(
        q,
        k,
        v,
        None,
        *lengths.arguments,
        True,
        0.0,
        lengths.causal,
        False,
        scale=scale,
    )
    HEADS_FIRST.add(lse.dim() == 2)
    return out, lse.transpose(0, 1) if lse.dim() == 2 else lse.squeeze(-1)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = q.new_zeros((), dtype=torch.int64)  # torch.zeros(()) would wait for the device
    if True in HEADS_FIRST:
        lse = _heads_first(lse)
    else:
        lse = lse.contiguous().unsqueeze(-1)
    return torch.ops.aten._cudnn_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        unused,
        unused,
        None,
        *lengths.arguments,
        0.0,
        lengths.causal,
        scale=scale,
    )


def _check_offsets(x: Tensor) -> None:
    """PyTorch hands cuDNN the place of a segment's first element as int32, and does not check that it fits."""
    if x.numel() > 2**31 - 1:
        raise UserError(
            f"kernels.flash=cudnn takes at most {2**31 - 1} elements of a tensor, but there are {tuple(x.shape)}; take "
            "another library, or fewer packs in a micro-batch"
        )


OWN = f"FlashAttention-2 of PyTorch {torch.__version__}"
PLAIN = Library("flash2", OWN, _flash_forward, _flash_backward)
FA3 = Library("flash3", "FlashAttention-3 (module flash_attn_interface)", _flash_forward, _flash_backward, "FA3")
FA4 = Library("flash4", "FlashAttention-4 (module flash_attn.cute)", _fa4_forward, _fa4_backward)
CUDNN = Library("cudnn", "cuDNN, which PyTorch makes build a plan for every call", _cudnn_forward, _cudnn_backward)


def fa2_problem(device: str, dtype: torch.dtype) -> str | None:
    """Why PyTorch's FlashAttention-2 cannot run, or None. All of these: see fused/choice.py."""
    if device != "cuda":
        return f"it is for GPUs, not for {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes fp16 and bf16, not {dtype} (cluster.precision=bf16)"
    return None


def fa3_problem(device: str, dtype: torch.dtype) -> str | None:
    return fa2_problem(device, dtype) or _capability_problem("fa3") or _fa3_registry_problem()


def fa4_problem(device: str, dtype: torch.dtype) -> str | None:
    problem = fa2_problem(device, dtype) or _capability_problem("fa4")
    if problem is None and not is_installed("flash_attn.cute"):
        return "flash_attn.cute is not installed"
    return problem or _fa4_import_problem()


def cudnn_problem(device: str, dtype: torch.dtype) -> str | None:
    problem = fa2_problem(device, dtype) or _capability_problem("cudnn")
    if problem is None and not hasattr(torch.ops.aten, "_cudnn_attention_backward"):
        return f"PyTorch {torch.__version__} has no backward of cuDNN's attention for different lengths"
    if problem is None and not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    return problem


def capability() -> int | None:
    """Major compute capability of this process's GPU; None without one."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None


def _capability_problem(name: str) -> str | None:
    major = capability()
    if major in LIBRARIES[name][1]:
        return None
    return f"it is for {written_for(name)} GPUs; " + (
        "there is none here" if major is None else f"this one is {major}.x"
    )


def _fa3_registry_problem() -> str | None:
    from torch.nn import attention

    if not hasattr(attention, "activate_flash_attention_impl"):
        return f"PyTorch {torch.__version__} has no registry of flash attentions"
    return (
        _fa3_activation_problem() if is_installed("flash_attn_interface") else "flash_attn_interface is not installed"
    )


@functools.cache
def _fa3_activation_problem() -> str | None:
    """Puts the library in place once, to see that it works, and takes it away again."""
    from torch.nn import attention

    if current_registered() == "FA3":
        return None
    try:
        attention.activate_flash_attention_impl("FA3")
    except Exception as error:  # noqa: BLE001 - a library built for another torch fails in any way it likes
        return _does_not_work("flash_attn_interface", error)
    attention.restore_flash_attention_impl()
    return None


@functools.cache
def _fa4_import_problem() -> str | None:
    try:
        missing = [name for name in ("_flash_attn_fwd", "_flash_attn_bwd") if not hasattr(_fa4(), name)]
    except Exception as error:  # noqa: BLE001 - as above
        return _does_not_work("flash_attn.cute", error)
    return f"flash_attn.cute is installed but has no {missing[0]}" if missing else None


def _does_not_work(module: str, error: Exception) -> str:
    said = str(error).splitlines()[0] if str(error) else repr(error)
    return f"{module} is installed but does not work: {said}"


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def libraries() -> dict[str, Any]:
    """Of every name of `kernels.flash` the library and its problem, in the order in which `auto` takes them."""
    return {
        "fa3": (FA3, fa3_problem),
        "fa4": (FA4, fa4_problem),
        "plain": (PLAIN, lambda device, dtype: None),
        "fa2": (PLAIN, fa2_problem),
        "cudnn": (CUDNN, cudnn_problem),
    }
