"""What a kernel of a device, or an operator of PyTorch, does, by its name: the kinds that a profile adds up.

Names are those of PyTorch, cuBLAS, cuDNN, CUTLASS, FlashAttention, NCCL, Transformer Engine, and of kernels that
PyTorch compiles (triton_poi_fused_..., whose names list the operators in them).
"""

from __future__ import annotations

import functools
import re

KINDS = (
    "attention",
    "matrix products",
    "norms and reductions",
    "elementwise",
    "copies and casts",
    "gather and scatter",
    "communication",
    "optimizer",
    "other",
)

# The first that matches decides. Operators of the CPU are written aten::name.
PATTERNS = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("communication", r"nccl|nvshmem|userbuffers|multimem|symm_mem|^c10d::|^gloo:|record_param_comms"),
        ("optimizer", r"multi_tensor|adam|aten::_foreach|^Optimizer\."),
        ("attention", r"flash|fmha|sdpa|attention|attn|^_attend"),
        ("matrix products", r"^triton_tem|^nvjet|gemm|gemv|splitk|cublas(?!.*(copy|memset))|xmma|wmma"),
        ("matrix products", r"cutlass.*(mm|tensorop)|^aten::(add|ba?dd)?b?mm|^aten::(matmul|linear|addmv|mv|dot)\b"),
        ("norms and reductions", r"^triton_(red|per|poi)_.*(norm|rsqrt|softmax|logsumexp|log_sum)"),
        ("elementwise", r"^triton_(red|per|poi)_"),
        ("copies and casts", r"direct_copy|_copy_kernel|^memcpy|^memset|catarray|fillfunctor|transpose.*kernel"),
        ("copies and casts", r"cast_kernel|^aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|fill_|zero_)\b"),
        ("gather and scatter", r"index|gather|scatter|embedding|radixsort|partials_per_segment|sum_and_scatter"),
        ("gather and scatter", r"^aten::(nonzero|masked_select|take|unique|sort|repeat_interleave)"),
        ("norms and reductions", r"norm|gammabeta|softmax|cross_entropy|reduce_kernel|devicereduce|devicescan|cumsum"),
        ("norms and reductions", r"^aten::(sum|mean|amax|amin|max|min|any|all|var|logsumexp|argmax)\b"),
        ("elementwise", r"elementwise|dropout|distribution|gelu|silu|swiglu|rotary|rope\b|_rope_|tri[ul]"),
        (
            "elementwise",
            r"^aten::_?(add|sub|mul|div|neg|exp|log|pow|sqrt|rsqrt|square|abs|sigmoid|tanh|cos|sin|where|clamp|bernoulli|"
            r"masked_fill|eq|ne|lt|le|gt|ge|bitwise\w*|logical\w*|logaddexp|reciprocal|maximum|minimum|threshold\w*)_?\b",
        ),
    )
)


@functools.cache
def kind_of(name: str) -> str:
    """The kind, one of KINDS, of a kernel or operator."""
    return next((kind for kind, pattern in PATTERNS if pattern.search(name)), "other")
