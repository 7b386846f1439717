"""Attention kernels over packs of message trees against SDPA with the dense bias, forward and backward.

    python -m benchmarks.attention [--sizes 8192 16384] [--video 36864] [--packs 3] [--repeats 3] [--out FILE]

Mixed packs are of the shape of stage 2, the video pack one video of stage 3 with 384 frames (tests/support/trees.py).
The heads are those that one of eight context-parallel ranks of the 4B and 8B models has: 4 query heads, 1 key head of
128; the video pack on CPU has one head of 64, so that the alternative ends in minutes.

    flash, blocks, flex   our kernels (attention/kernels.py); flex only on CUDA, blocks only on CPU
    flash[fa2], ...       on CUDA: flash with one of its libraries (`kernels.flash`: fa2, fa3, fa4, cudnn); without a
                          name, the one that `auto` takes. cudnn is slow at first sight: PyTorch builds a plan for
                          every call (fused/varlen.py), so ask for it by name
    dense bias            scaled_dot_product_attention with a bias [S, S] in the inputs' dtype and repeated key heads,
                          as the published code does it. The bias is made beforehand and its making is not timed
    full[fa2], ...        on CUDA, beside each of them: the same library's one call of every query over every key, no
                          mask and nothing to merge: what the card can do with it

Time is processor time on CPU, one thread, and device time on CUDA; ways take turns, and a pack's ratios are medians
over its turns. The summary's ratios are of the time of all packs together, since a step waits for the slow ones too.
Memory is the peak of what forward and backward allocate, the bias included, inputs not. TFLOP/s count allowed pairs
only: 4 operations for each pair and head dimension forward, 10 backward (as the FlashAttention papers count).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import machine, write_result
from molmo2_nemo.attention.kernels import Kernel, attend, choose
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.regions import MaskRegion, region_of
from molmo2_nemo.fused import choice, varlen
from tests.support.allocations import Allocations
from tests.support.trees import Tree, long_video_pack, mixed_pack, token_mask

TARGETS = {
    "cpu": {"mixed packs against dense bias": 3.0},
    "cuda": {"mixed packs against dense bias": 10.0, "video against dense bias": 4.0, "share of full": 0.85},
}
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_bias(mask: TokenMask, dtype: torch.dtype) -> Tensor:
    """[1, 1, S, S]: 0 where allowed, the dtype's lowest number elsewhere."""
    bias = torch.empty(1, 1, mask.size, mask.size, dtype=dtype, device=mask.example_ids.device)
    for start in range(0, mask.size, 512):
        rows = slice(start, min(start + 512, mask.size))
        allowed = mask.rows(rows.start, rows.stop)
        bias[0, :, rows] = torch.where(allowed, 0.0, torch.finfo(dtype).min)
    return bias


def with_bias(mask: TokenMask, scale: float) -> Callable[[torch.dtype], Way]:
    """Attention with the dense bias as the published code does it: prepared for a dtype, then called like a kernel."""

    def make(dtype: torch.dtype) -> Way:
        bias = dense_bias(mask, dtype)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).permute(2, 0, 1, 3)

        return run

    return make


def full(library: varlen.Library, region: MaskRegion, scale: float) -> Callable[[torch.dtype], Way]:
    """No mask: one call of the library in which every query sees every key."""

    def lengths(q: Tensor, k: Tensor) -> varlen.Lengths:
        queries, keys = (torch.tensor([0, len(t)], dtype=torch.int32, device=t.device) for t in (q, k))
        return varlen.Lengths(False, queries, keys, len(q), len(k))

    def forward(q: Tensor, k: Tensor, v: Tensor, region: MaskRegion, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out, lse = library.forward(q, k, v, lengths(q, k), scale)
        return out.unsqueeze(1), lse.unsqueeze(1)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, _, scale = rest
        grad, q, k, v, out, lse = (t.flatten(0, 1) for t in (grad, q, k, v, out, lse))
        dq, dk, dv = library.backward(grad, q, k, v, out, lse, lengths(q, k), scale)
        return dq.unsqueeze(1), dk.unsqueeze(1), dv.unsqueeze(1)

    def make(dtype: torch.dtype) -> Way:
        kernel = Kernel("full", forward, backward, lambda region, device: None, library.implementation, library.title)
        return prepared(library, lambda q, k, v: attend(q, k, v, region, scale, kernel))

    return make


def prepared(library: varlen.Library | None, way: Way) -> Way:
    """The way, before whose turns a library is put where others may have put theirs (`measure` does)."""
    if library is not None and torch.cuda.is_available():
        way.prepare = library.prepare  # type: ignore[attr-defined]
    return way


def library_of(name: str, args: argparse.Namespace) -> choice.Choice:
    """The library that a kernel's name asks for, such as "flash[fa2]"; without one, what `auto` takes.

    Raises:
        UserError: it cannot run here, and why.
    """
    wanted = name.partition("[")[2].rstrip("]") or "auto"
    return choice.choose("flash", wanted, args.device, args.dtype)


def timed(function: Callable[[], Any], device: str) -> tuple[Any, float]:
    """Seconds of processor or device time, and the result."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = function()
        stop.record()
        torch.cuda.synchronize()
        return result, start.elapsed_time(stop) / 1000
    before = time.process_time()
    result = function()
    return result, time.process_time() - before


def measure(way: Way, inputs: list[Tensor], grad: Tensor, device: str) -> dict[str, float]:
    """One forward and backward pass: seconds of each."""
    getattr(way, "prepare", lambda: None)()
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    out, forward = timed(lambda: way(q, k, v), device)
    _, backward = timed(lambda: torch.autograd.grad(out, (q, k, v), grad), device)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def peak_memory(make: Callable[[torch.dtype], Way], inputs: list[Tensor], grad: Tensor, device: str) -> int:
    """Bytes at the peak of one forward and backward pass beyond the inputs, what the way prepares included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measure(make(grad.dtype), inputs, grad, device)
        return torch.cuda.max_memory_allocated() - before
    with Allocations() as allocations:
        measure(make(grad.dtype), inputs, grad, device)
    return allocations.peak


def compare(trees: list[Tree], size: int, heads: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Any]:
    """Times every kernel and baseline on one pack."""
    device, dtype = args.device, args.dtype
    mask = token_mask([trees], size, args.rule, device)
    region = region_of(mask)
    query_heads, key_heads, head = heads
    scale = head**-0.5
    generator = torch.Generator().manual_seed(size)
    shapes = [(size, 1, n, head) for n in (query_heads, key_heads, key_heads, query_heads)]
    *inputs, grad = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    ways = {name: kernel_way(name, region, scale, args) for name in args.kernels}
    ways["dense bias"] = with_bias(mask, scale)
    if device == "cuda":
        for name in flash_names(args):
            ways[name.replace("flash", "full")] = full(library_of(name, args).function, region, scale)
    result: dict[str, Any] = {
        "tokens": size,
        "heads": heads,
        "pairs": region.pairs,
        "mask area": region.pairs / size**2,
    }
    result["peak bytes"] = {name: peak_memory(make, inputs, grad, device) for name, make in ways.items()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    ready = {name: make(dtype) for name, make in ways.items()}
    for _ in range(args.repeats):
        for name, way in ready.items():
            runs[name].append(measure(way, inputs, grad, device))
    result["seconds"] = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in runs.items()}
    result["times faster than dense bias"] = {
        name: {
            part: statistics.median(d[part] / o[part] for d, o in zip(runs["dense bias"], runs[name], strict=True))
            for part in ("forward", "backward", "both")
        }
        for name in args.kernels
    }
    operations = {"forward": 4.0, "backward": 10.0, "both": 14.0}
    pairs = {name: size**2 if name.startswith("full") else region.pairs for name in ways}
    result["TFLOP/s"] = {
        name: {k: n * pairs[name] * query_heads * head / seconds[k] / 1e12 for k, n in operations.items()}
        for name, seconds in result["seconds"].items()
    }
    return result


def flash_names(args: argparse.Namespace) -> list[str]:
    return [name for name in args.kernels if name.startswith("flash")]


def kernel_way(name: str, region: MaskRegion, scale: float, args: argparse.Namespace) -> Callable[[torch.dtype], Way]:
    """A kernel of ours; its pack is planned once, outside what is timed, as a micro-batch's is for all layers."""

    def make(dtype: torch.dtype) -> Way:
        library = library_of(name, args).function if name in flash_names(args) else None
        merging = choice.choose("merge", args.merge, args.device, dtype).function
        kernel = choose(name.partition("[")[0], args.device, dtype, 128, library=library, merging=merging)
        region.cache.clear()  # a pack's plan is part of its cost in memory

        return prepared(library, lambda q, k, v: attend(q, k, v, region, scale, kernel))

    return make


def verdicts(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """How far each target was reached, by every flash kernel that was measured."""

    def ratio(kind: str, name: str) -> float:
        dense, ours = (sum(r["seconds"][way]["both"] for r in results[kind]) for way in ("dense bias", name))
        return dense / ours

    reached = {}
    for name in flash_names(args):
        if results["mixed"]:
            reached[name, "mixed packs against dense bias"] = ratio("mixed", name)
        if results["video"]:
            reached[name, "video against dense bias"] = ratio("video", name)
        if args.device == "cuda":
            rates = [r["TFLOP/s"] for rs in results.values() for r in rs]
            shares = [r[name]["both"] / r[name.replace("flash", "full")]["both"] for r in rates]
            reached[name, "share of full"] = statistics.median(shares)
    targets = TARGETS[args.device]
    return {
        f"{name}, {what}": {"reached": value} | ({"target": targets[what]} if what in targets else {})
        for (name, what), value in reached.items()
    }


def show(kind: str, r: dict[str, Any]) -> None:
    print(f"{kind}, {r['tokens']} tokens, mask area {r['mask area']:.3f} of S x S")
    for name, seconds in r["seconds"].items():
        faster = r["times faster than dense bias"].get(name, {}).get("both")
        print(
            f"  {name:13}  forward {seconds['forward']:8.4f} s  backward {seconds['backward']:8.4f} s  "
            f"{r['TFLOP/s'][name]['both']:8.4f} TFLOP/s  peak {r['peak bytes'][name] / 2**20:8.1f} MiB"
            + (f"  {faster:5.2f} times faster than dense bias" if faster else ""),
            flush=True,
        )


def default_kernels(args: argparse.Namespace) -> list[str]:
    if args.device == "cpu":
        return ["flash", "blocks"]
    ways = choice.PIECES["flash"]
    able = [name for name in ("fa3", "fa4", "fa2") if ways[name].problem(args.device, args.dtype) is None]
    return [*(f"flash[{name}]" for name in able), "flex"]


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--sizes", type=int, nargs="*", default=[16384, 36864] if cuda else [8192])
    parser.add_argument("--packs", type=int, nargs="+", default=[3], help="mixed packs: for all sizes, or for each")
    parser.add_argument("--video", type=int, nargs="*", default=[36864], help="sizes of packs with one video")
    parser.add_argument("--kernels", nargs="+", help="default: flash[...] of every library that `auto` may take, flex")
    parser.add_argument("--merge", default="auto", choices=("auto", "plain", "compiled"), help="kernels.merge of flash")
    parser.add_argument("--rule", default="image_tokens", choices=("image_tokens", "within_image", "none"))
    parser.add_argument("--repeats", type=int, default=10 if cuda else 3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.kernels = args.kernels or default_kernels(args)
    libraries = {name: library_of(name, args).title for name in flash_names(args)}  # or say why not, before anything
    results: dict[str, list[dict[str, Any]]] = {"mixed": [], "video": []}
    if len(args.packs) not in (1, len(args.sizes)):
        parser.error(f"--packs has {len(args.packs)} numbers for {len(args.sizes)} sizes; give one, or one for each")
    for number, size in enumerate(args.sizes):
        rng = np.random.default_rng(size)
        for _ in range(args.packs[number % len(args.packs)]):
            results["mixed"].append(compare(mixed_pack(rng, size), size, (4, 1, 128), args))
            show("mixed", results["mixed"][-1])
    for size in args.video:
        frames = 384 * size // 36864
        heads = (4, 1, 128) if args.device == "cuda" else (1, 1, 64)
        results["video"].append(compare(long_video_pack(size, frames), size, heads, args))
        show(f"video of {frames} frames", results["video"][-1])
    summary = verdicts(results, args)
    for name, value in summary.items():
        print(f"{name}: {value['reached']:.2f}" + (f" (target {value['target']})" if "target" in value else ""))
    settings = {key: str(getattr(args, key)) for key in ("device", "dtype", "rule", "repeats", "packs", "merge")}
    settings["libraries"] = str(libraries)
    write_result("attention", {"machine": machine(), "settings": settings, "summary": summary, **results}, args.out)


if __name__ == "__main__":
    main()
