"""The optimizer's step by each way of `kernels.adamw`, and the gradients' norms alone, in one run: time and memory.

    python -m benchmarks.optimizer [--model 4b] [--layers 1] [--blocks 2] [--vocabulary 8192] [--repeats 7] [--out FILE]

The step is the trainer's (training/optimizer.py) in one process that shares nothing: norms of the three groups,
clipping, AdamW. The model has the preset's widths, a few layers and blocks and a part of the vocabulary, fp32;
gradients are random, and the same for every way. Norms are also taken by PyTorch's foreach norms, in fp32, which no
way uses: how far off each is stands beside its time.

Every way in turn, repeated: medians of processor time (one thread) on a CPU, of seconds on CUDA. Memory is the most
that exists at once beside weights, gradients and moments: on CUDA torch.cuda.max_memory_allocated, on a CPU all that
PyTorch's profiler sees allocated and freed, inside operations as well.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import machine, write_result
from benchmarks.startup import smaller
from molmo2_nemo.fused.adamw import squares_in_fp64
from molmo2_nemo.fused.choice import PIECES
from molmo2_nemo.model.config import PRESETS, Molmo2Config, preset
from molmo2_nemo.settings.run import OptimConfig

STEPS = {name: PIECES["adamw"][name].function for name in ("plain", "fused")}
Job = Callable[[], Any]


def squares_by_foreach(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares by PyTorch's norms of many tensors at once, each in fp32."""
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()


NORMS = {name: way.squares for name, way in STEPS.items()} | {"foreach": squares_by_foreach}


def with_optimizer(model: Molmo2Config, way: str) -> Any:
    """The optimizer of a model, with random gradients and the optimizer's state made."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from molmo2_nemo.training.optimizer import adam_config, clipping_optimizer

    config = transformer_config(model, use_cpu_initialization=True)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    built = Molmo2Model(model, config, seed=None)
    chunk = DistributedDataParallel(config, ddp, built.cuda())
    generator = torch.Generator(next(chunk.parameters()).device).manual_seed(0)
    for parameter in chunk.parameters():
        parameter.main_grad.normal_(std=1e-3, generator=generator)
    optim = OptimConfig()
    settings = adam_config(optim, bf16=False, distributed=False)
    return clipping_optimizer(
        settings, [chunk], optim, lambda *_: False, use_gloo_process_groups=True, adamw=STEPS[way]
    )


def gradients(optimizer: Any) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def clock() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(jobs: dict[str, Job], repeats: int) -> dict[str, list[float]]:
    """Times of every job, in turns, after one turn that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            start = clock()
            job()
            taken[name].append(clock() - start)
    return {name: times[1:] for name, times in taken.items()}


def peak(job: Job) -> int:
    """Most bytes that exist at once beside what was there before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def compared(jobs: dict[str, Job], repeats: int) -> dict[str, dict[str, Any]]:
    """Median, ratio to the plain way, memory, and all times of every job."""
    times = seconds(jobs, repeats)
    plain = statistics.median(times["plain"])
    return {
        name: {
            "seconds": statistics.median(taken),
            "ratio": statistics.median(taken) / plain,
            "peak": peak(jobs[name]),
            "times": [round(t, 4) for t in taken],
        }
        for name, taken in times.items()
    }


def errors(tensors: Sequence[Tensor]) -> dict[str, float]:
    """How far every norm is from the exact one, as a share of it."""
    exact = math.sqrt(squares_in_fp64(tensors))
    return {name: abs(math.sqrt(squares(tensors)) / exact - 1) for name, squares in NORMS.items()}


def measure(model: Molmo2Config, repeats: int) -> dict[str, Any]:
    optimizers = {way: with_optimizer(model, way) for way in STEPS}
    gc.collect()
    steps = compared({way: optimizer.step for way, optimizer in optimizers.items()}, repeats)
    tensors = gradients(optimizers["plain"])
    norms = compared({n: lambda squares=s: float(squares(tensors)) for n, s in NORMS.items()}, repeats)
    for name, error in errors(tensors).items():
        norms[name]["error"] = error
    return {"parameters": sum(t.numel() for t in tensors), "tensors": len(tensors), "step": steps, "norms": norms}


def show(found: dict[str, Any]) -> None:
    print(f"{found['parameters'] / 1e6:.0f} million parameters in {found['tensors']} tensors")
    for kind in ("step", "norms"):
        for name, row in found[kind].items():
            error = f", off by {row['error']:.0e}" if "error" in row else ""
            print(
                f"{kind:6}{name:8} {1e3 * row['seconds']:8.1f} ms, {row['ratio']:.2f} of plain, "
                f"{row['peak'] / 2**20:.1f} MiB{error}"
            )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PRESETS, default="4b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)

    from molmo2_nemo import cpu
    from molmo2_nemo.inference.load import start_single_process

    cpu.enable(1)
    start_single_process()
    started, model = machine(), smaller(preset(args.model), args.layers, args.blocks)
    model = replace(model, text=replace(model.text, vocab_size=min(args.vocabulary, model.text.vocab_size)))
    found = measure(model, args.repeats)
    show(found)
    shape = {name: getattr(args, name) for name in ("model", "layers", "blocks", "vocabulary", "repeats")}
    write_result("optimizer", {"machine": started} | shape | found, args.out)
    return found


if __name__ == "__main__":
    main()
