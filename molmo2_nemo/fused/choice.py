"""Which of several equal functions computes a piece of the model: the plain one, or a faster twin.

PIECES has for every field of `KernelConfig` (model/config.py) its ways, the fastest on CUDA first; `auto` takes the
first that can run there, and the plain way on every other device. To add a way: a function beside the plain one, a line
here, and its name in KernelConfig. tests/fused/test_choice.py checks that nothing is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from molmo2_nemo.errors import UserError, nearest
from molmo2_nemo.fused import (
    adamw,
    compiled,
    cross_entropy,
    merge,
    norm,
    pooling,
    residual,
    rotary,
    swiglu,
    varlen,
    vision,
)

Problem = Callable[[str, torch.dtype], str | None]  # (cpu | cuda | ..., dtype of the parameters) -> why not, or None


def anywhere(device: str, dtype: torch.dtype) -> str | None:
    """The problem of a way that has none."""
    return None


@dataclass(frozen=True)
class Way:
    """One way to compute a piece. All ways of a piece take the same arguments."""

    title: str  # what the log calls it
    function: Any
    problem: Problem = anywhere


@dataclass(frozen=True)
class Choice:
    """The way that was taken."""

    piece: str
    name: str
    title: str
    function: Any
    fell_back: str | None = None  # why `auto` did not take the fastest way on CUDA

    def __str__(self) -> str:
        return f"{self.piece} {self.name} ({self.title}{f'; {self.fell_back}' if self.fell_back else ''})"


PLAIN, COMPILED = "tensor operations", "compiled by PyTorch"
PIECES: dict[str, dict[str, Way]] = {
    "norm": {
        "compiled": Way(COMPILED, norm.by_compiler, compiled.problem),
        "torch": Way("F.rms_norm", norm.by_torch),
        "plain": Way(PLAIN, norm.plain),
    },
    "rotary": {
        "compiled": Way(f"{COMPILED}, with QK-norm", rotary.by_compiler, compiled.problem),
        "plain": Way(PLAIN, rotary.plain),
    },
    "swiglu": {
        "compiled": Way(COMPILED, swiglu.by_compiler, compiled.problem),
        "plain": Way(PLAIN, swiglu.plain),
    },
    "residual": {
        "compiled": Way(COMPILED, residual.by_compiler, compiled.problem),
        "plain": Way(PLAIN, residual.plain),
    },
    "vision": {
        "compiled": Way(COMPILED, vision.by_compiler, compiled.problem),
        "plain": Way(PLAIN, vision.plain),
    },
    "pooling": {
        "compiled": Way(f"written out, {COMPILED}", pooling.COMPILED, compiled.problem),
        "direct": Way("written out", pooling.DIRECT),
        "plain": Way("scaled_dot_product_attention", pooling.PLAIN),
    },
    "loss": {
        "compiled": Way(f"gradients in forward, {COMPILED}", cross_entropy.by_compiler, compiled.problem),
        "fused": Way("gradients in forward", cross_entropy.fused),
        "plain": Way("gradients in backward", cross_entropy.plain),
    },
    "adamw": {
        "fused": Way("fused AdamW, norms from fp32 chunks", adamw.FUSED),
        "plain": Way("AdamW as Megatron-core makes it, norms in fp64", adamw.PLAIN),
    },
    "merge": {
        "compiled": Way(COMPILED, merge.COMPILED, compiled.problem),
        "plain": Way(PLAIN, merge.PLAIN),
    },
    "flash": {name: Way(library.title, library, problem) for name, (library, problem) in varlen.libraries().items()},
    "inputs": {  # the function is whether training/ahead.py does it
        "ahead": Way("planned and copied one micro-batch ahead", True),
        "plain": Way("planned and copied when it is needed", False),
    },
}


def possible(device: torch.device | str, dtype: torch.dtype) -> dict[str, frozenset[str]]:
    """The ways of every piece that this process can run."""
    kind = torch.device(device).type
    return {
        piece: frozenset(name for name, way in ways.items() if way.problem(kind, dtype) is None)
        for piece, ways in PIECES.items()
    }


def in_common(found: Sequence[Mapping[str, frozenset[str]]]) -> dict[str, frozenset[str]]:
    """The ways that all processes can run, from what `possible` found in each: their collectives and their dropout only
    go together where all take the same."""
    return {piece: frozenset.intersection(*(ways[piece] for ways in found)) for piece in PIECES}


def choose(
    piece: str,
    wanted: str,
    device: torch.device | str,
    dtype: torch.dtype,
    among: Mapping[str, frozenset[str]] | None = None,
) -> Choice:
    """The way `wanted` of a piece, or for "auto" the first on CUDA that works, and the plain one elsewhere.

    Args:
        dtype: of the model's parameters.
        among: from `in_common`: "auto" takes no other way. None: this process is alone.

    Raises:
        UserError: no such way, or one that cannot run here; the message names those that can.
    """
    ways, kind = PIECES[piece], torch.device(device).type
    if wanted not in ("auto", *ways):
        raise UserError(f"kernels.{piece}={wanted}: no such way; {nearest(wanted, ('auto', *ways))}")
    if wanted != "auto":
        problem = ways[wanted].problem(kind, dtype)
        if problem is not None:
            others = ", ".join(name for name, way in ways.items() if way.problem(kind, dtype) is None)
            raise UserError(f"kernels.{piece}={wanted}: {problem}; use auto or one of: {others}")
        return Choice(piece, wanted, ways[wanted].title, ways[wanted].function)
    reasons = []
    for name in ways if kind == "cuda" else ("plain",):
        problem = ways[name].problem(kind, dtype)
        if problem is None and among is not None and name not in among[piece]:
            problem = "another rank cannot run it"
        if problem is None:
            break
        reasons.append(f"not {name}: {problem}")
    return Choice(piece, name, ways[name].title, ways[name].function, "; ".join(reasons) or None)


def choose_all(
    wanted: Mapping[str, str],
    device: torch.device | str,
    dtype: torch.dtype,
    among: Mapping[str, frozenset[str]] | None = None,
) -> dict[str, Choice]:
    """`choose` for every piece. Args: wanted: piece -> way, `vars` of a KernelConfig.

    Raises:
        UserError: as `choose`.
    """
    return {piece: choose(piece, way, device, dtype, among) for piece, way in wanted.items()}


def described(choices: Mapping[str, Choice]) -> str:
    """One line for the log: every choice with its title, or with why it is the plain one."""
    return "kernels: " + ", ".join(map(str, choices.values()))
