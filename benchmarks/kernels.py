"""Pieces of the model by each way that can run here, forward and backward, in one run: time and peak memory.

    python -m benchmarks.kernels [--pieces norm loss] [--repeats 5] [--out FILE]      CPU: the tiny model's widths, fp32
    python -m benchmarks.kernels --model 4b --tokens 36864 --crops 48                 CUDA: real widths, bf16

Every way of a piece (`kernels.*`, docs/kernels.md) gets the same tensors. Time is the median of the repeats, after one
that compiles and one that warms up. Memory is what exists at the peak beside the inputs: on CUDA
torch.cuda.max_memory_allocated, on a CPU every tensor's storage as operations return them, which compiled code does not
show: no figure there. Not here: attention (benchmarks.attention), the optimizer's step (benchmarks.train_step).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import machine, write_result
from molmo2_nemo.fused.choice import PIECES
from molmo2_nemo.model.config import PRESETS, Molmo2Config, preset
from tests.support.allocations import Allocations

RATE = 0.1
Case = tuple[Callable[..., Any], tuple[Tensor, ...]]  # (way's function, *tensors) -> outputs; the tensors


class Cases:
    """Inputs of every piece at one model's widths."""

    def __init__(self, model: Molmo2Config, device: str, dtype: torch.dtype, tokens: int, crops: int) -> None:
        self.model, self.device, self.dtype, self.tokens, self.crops = model, device, dtype, tokens, crops
        self.generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype).requires_grad_()

    def norm(self) -> Case:
        width = self.model.text.hidden_size
        return lambda f, x, w: f(x, w, 1e-6), (self.random(self.tokens, 1, width), self.random(width))

    def rotary(self) -> Case:
        text = self.model.text
        q, k = (self.random(self.tokens, 1, n, text.head_dim) for n in (text.num_heads, text.num_kv_heads))
        angles = self.random(self.tokens, 1, 1, text.head_dim, dtype=torch.float32).detach()
        weights = self.random(text.head_dim), self.random(text.head_dim)
        return lambda f, *t: f(*t[:2], angles.cos(), angles.sin(), *t[2:], 1e-6), (q, k, *weights)

    def swiglu(self) -> Case:
        return lambda f, x: f(x), (self.random(self.tokens, 1, 2 * self.model.text.ffn_size),)

    def residual(self) -> Case:
        shape = self.tokens, 1, self.model.text.hidden_size
        return lambda f, x, residual: f(x, residual, RATE), (self.random(*shape), self.random(*shape))

    def vision(self) -> Case:
        from molmo2_nemo.model.vision import VisionBlock

        block = VisionBlock(self.model.vision, self.dtype).to(self.device)
        heads = self.model.vision.num_heads
        x = self.random(self.crops, self.model.vision.num_patches, self.model.vision.hidden_size)
        return lambda f, x, *p: f(x, heads, 1e-6, False, *p), (x, *block.parameters())

    def pooling(self) -> Case:
        """Windows of 3 x 3 patches; a third of the positions empty, as in packs of images and video."""
        c, rows = self.model.connector, self.crops * self.model.vision.num_patches
        features, places = self.random(rows, self.model.vision.feature_size), torch.arange(rows, device=self.device)
        windows = places[: rows // 9 * 9].view(-1, 9)
        windows = torch.where(torch.arange(9, device=self.device) < 6, windows, -1)
        maps = [self.random(self.model.vision.feature_size, c.hidden_size, scale=0.02) for _ in range(3)]

        def run(function: Any, features: Tensor, q_map: Tensor, k_map: Tensor, v_map: Tensor) -> Tensor:
            patches, query, valid = function.gather(features, windows)
            return function.attend(query @ q_map, patches @ k_map, patches @ v_map, valid, c.num_heads, False)

        return run, (features, *maps)

    def loss(self) -> Case:
        """An eighth of the tokens have a loss; the head is frozen, as in the published runs."""
        text, n = self.model.text, self.tokens // 8
        labels = torch.randint(text.vocab_size, (n,), device=self.device, generator=self.generator)
        weights = torch.ones(n, device=self.device)
        head = self.random(text.vocab_size, text.hidden_size, scale=0.02).detach()
        group = torch.distributed.group.WORLD
        rest = (head, labels, weights, 1e-4, text.vocab_size, group, 1024)
        return lambda f, hidden: f(hidden, *rest), (self.random(n, text.hidden_size),)


def once(function: Any, case: Case) -> None:
    """Forward and backward."""
    run, tensors = case
    outputs = run(function, *tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, tensors, [torch.ones_like(o) for o in outputs])


def seconds(function: Any, case: Case, device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        once(function, case)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def peak(function: Any, case: Case, device: str) -> int:
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(function, case)
        return torch.cuda.max_memory_allocated() - before
    with Allocations() as allocations:
        once(function, case)
    return allocations.peak


def measure(cases: Cases, pieces: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row per piece and way; a way that cannot run has its reason in place of figures."""
    rows = []
    for piece in pieces:
        case = getattr(cases, piece)()
        for name, way in reversed(PIECES[piece].items()):  # the plain one first
            row: dict[str, Any] = {"piece": piece, "way": name}
            reason = way.problem(cases.device, cases.dtype)
            if reason is None:
                row["seconds"] = seconds(way.function, case, cases.device, repeats)
                seen = cases.device == "cuda" or name != "compiled"
                row["peak"] = peak(way.function, case, cases.device) if seen else None
            else:
                row["cannot run"] = reason
            rows.append(row)
            shown = reason or f"{1e3 * row['seconds']:.2f} ms"
            shown += f", {row['peak'] / 2**20:.1f} MiB" if row.get("peak") is not None else ""
            print(f"{piece:9} {name:9} {shown}", flush=True)
        del case
    return rows


MEASURED = [piece for piece in PIECES if hasattr(Cases, piece)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PRESETS, default="4b" if device == "cuda" else "tiny")
    parser.add_argument("--tokens", type=int, default=16384 if device == "cuda" else 1024)
    parser.add_argument("--crops", type=int, default=48 if device == "cuda" else 4)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16" if device == "cuda" else "float32"
    )
    parser.add_argument("--pieces", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    started = machine()
    cases = Cases(preset(args.model), device, getattr(torch, args.dtype), args.tokens, args.crops)
    result = {"machine": started, "model": args.model, "tokens": args.tokens, "crops": args.crops, "dtype": args.dtype}
    result["rows"] = measure(cases, args.pieces, args.repeats)
    write_result("kernels", result, args.out)
    return result


if __name__ == "__main__":
    main()
