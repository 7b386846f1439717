"""The card's ceilings: what copies, matrix products and attention without a mask reach, apart from this project's code.

    python -m benchmarks.gpu.probe [--out FILE] [--tiny]

Products have the shapes of the 4B's linear layers at the stages' pack lengths, with their weight gradients; attention
is scaled_dot_product_attention over one long pack, by each of PyTorch's backends. Device time by events, the median
of several; --tiny runs small shapes on the CPU, where the figures say nothing. What fails is recorded, and the rest
goes on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.report import machine, write_result

LONG = 36864  # tokens of a pack of stage 3
PATCHES = 128 * 729  # of 128 crops
PRODUCTS = {  # rows, inner, columns
    "8192 cubed": (8192, 8192, 8192),
    "decoder qkv": (LONG, 2560, 6144),
    "decoder output": (LONG, 4096, 2560),
    "decoder fc1": (LONG, 2560, 19456),
    "decoder fc2": (LONG, 9728, 2560),
    "decoder fc1, weights": (19456, LONG, 2560),
    "encoder qkv": (PATCHES, 1152, 3456),
    "encoder fc1": (PATCHES, 1152, 4304),
    "encoder fc2": (PATCHES, 4304, 1152),
    "encoder fc1, weights": (4304, PATCHES, 1152),
    "head, 1024 tokens": (1024, 2560, 151936),
}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
HEADS, HEAD = 32, 128
SHRINK = 256  # of every size with --tiny


def median_ms(function: Callable[[], Any], cuda: bool, count: int = 7, warmup: int = 2) -> float:
    """Milliseconds of a call: device time, or a clock's on the CPU."""
    for _ in range(warmup):
        function()
    found = []
    for _ in range(count if cuda else 1):
        if cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(stop))
        else:
            before = time.perf_counter()
            function()
            found.append(1e3 * (time.perf_counter() - before))
    return statistics.median(found)


def copies(cuda: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """On the device (bytes read and written), and from pinned memory of the host to it."""
    size = 2**31 if cuda else 2**20
    device = "cuda" if cuda else "cpu"
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    ms = median_ms(lambda: target.copy_(source), cuda)
    yield "copy on the device", {"ms": ms, "TB/s": 2 * size / ms / 1e9}
    host = torch.empty(size // 8, dtype=torch.uint8, pin_memory=cuda)
    ms = median_ms(lambda: target[: size // 8].copy_(host, non_blocking=True), cuda)
    yield "copy from the host, pinned", {"ms": ms, "TB/s": size / 8 / ms / 1e9}


def products(cuda: bool) -> Iterator[tuple[str, dict[str, float]]]:
    for name, shape in PRODUCTS.items():
        rows, inner, columns = shape if cuda else (max(8, n // SHRINK) for n in shape)
        a, b = (_random(n, inner, cuda=cuda) for n in (rows, columns))
        ms = median_ms(lambda a=a, b=b: a @ b.T, cuda)
        yield f"product {name}", {"ms": ms, "TFLOP/s": 2.0 * rows * inner * columns / ms / 1e9}


def attention(cuda: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """No mask, and a causal one, which is half the pairs: forward and backward by backend."""
    size, heads = (LONG, HEADS) if cuda else (LONG // SHRINK, 2)
    backends = BACKENDS if cuda else {"flash": SDPBackend.FLASH_ATTENTION}
    for backend, chosen in backends.items():
        for causal in (False, True):
            q, k, v = (_random(1, heads, size, HEAD, cuda=cuda).requires_grad_() for _ in range(3))
            grad = torch.randn_like(q)
            work = 4.0 * size**2 * heads * HEAD * (0.5 if causal else 1.0)
            name = f"attention {backend}, {'causal' if causal else 'full'}"
            with sdpa_kernel(chosen):

                def forward(q=q, k=k, v=v, causal=causal) -> torch.Tensor:
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

                ms = median_ms(forward, cuda, 3, 1)
                yield f"{name}, forward", {"ms": ms, "TFLOP/s": work / ms / 1e9}
                out = forward()

                def backward(out=out, inputs=(q, k, v), grad=grad) -> Any:
                    return torch.autograd.grad(out, inputs, grad, retain_graph=True)

                ms = median_ms(backward, cuda, 3, 1)
                yield f"{name}, backward", {"ms": ms, "TFLOP/s": 2.5 * work / ms / 1e9}


def _random(*shape: int, cuda: bool) -> torch.Tensor:
    return torch.randn(*shape, device="cuda" if cuda else "cpu", dtype=torch.bfloat16)


def probe(cuda: bool) -> dict[str, dict[str, Any]]:
    """Every figure by its name; of a group that failed, the error."""
    found: dict[str, dict[str, Any]] = {}
    for group in (copies, products, attention):
        try:
            for name, figures in group(cuda):
                found[name] = {unit: round(value, 4) for unit, value in figures.items()}
                print(f"{name:36} {found[name]}", flush=True)
        except RuntimeError as error:
            found[group.__name__] = {"error": str(error)[:300]}
            print(f"{group.__name__} failed: {error}", flush=True)
        if cuda:
            torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = probe(cuda=not args.tiny)
    write_result("probe", {"machine": machine(), "tiny": args.tiny, "figures": found}, args.out)
    if any("error" in row for row in found.values()):
        raise SystemExit("not every group could be measured, see above")


if __name__ == "__main__":
    main()
