"""Peak memory of one training step against the length of the pack, for every memory option, beside the planner's
prediction.

    python -m benchmarks.memory [--sizes 4608 9216 18432 36864] [--out FILE]            CPU: a narrow model, fp32
    python -m benchmarks.memory --model 4b --layers 4 [--sizes ...]                     CUDA: real widths, bf16

One step is forward and backward of the whole model (vision, connector, decoder, loss) on one process; parameters,
their gradients and the pack itself are there before and do not count. Packs are videos with the published share of
frames: on CUDA one of the whole length, on CPU as many of 2,304 tokens as fit, which keeps the run short and changes
nothing about memory (no kernel of ours makes anything of S x S elements).

On CPU every tensor's storage is counted while the step runs (tests/support/memory.py), and what offload keeps in host
memory is left out, as if the rest were a device's. On CUDA it is torch.cuda.max_memory_allocated.

The planner (molmo2_nemo/plan/memory.py) is asked for the same model, length, crops and options; its error is its figure
over the measured one, less 1. It knows bf16 and fp32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine, write_result
from benchmarks.train_step import with_layers
from molmo2_nemo.model.config import MemoryConfig, preset
from tests.support.batches import Shapes, batch
from tests.support.memory import Subject, build, counting, narrow, predicted

SHORT_VIDEO = 2304  # tokens
TILES = {"mlp_tiles": 8}
CHUNK = {"vision_chunk": 16}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "recompute=selective": {"recompute": "selective"},
    "recompute=selective, of core_attn": {"recompute": "selective", "recompute_modules": ["core_attn"]},
    "mlp_tiles=8": TILES,
    "vision_chunk=16": CHUNK,
    "offload": {"offload": True},
    "recompute=full": {"recompute": "full"},
    "full, with attention": {"recompute": "full", "recompute_attention": True},
    "full, tiles": {"recompute": "full"} | TILES,
    "full, tiles, chunks": {"recompute": "full"} | TILES | CHUNK,
    "full, tiles, chunks, offload": {"recompute": "full", "offload": True} | TILES | CHUNK,
}


def measure(subject: Subject, sizes: list[int], names: list[str], video: int | None) -> list[dict[str, Any]]:
    """One row per option and size."""
    from molmo2_nemo.model.inputs import PackInputs

    shapes, rows = Shapes(subject.model), []
    for name in names:
        options = MemoryConfig(**OPTIONS[name])
        model = build(subject, options)
        for size in sizes:
            packs = [shapes.videos(size, min(size, video or size))]
            inputs = PackInputs.from_batch(batch(packs, size, subject.model), subject.device)
            with counting(subject.device) as peak:
                model(inputs).loss.backward()
            expected = predicted(subject, options, size, len(inputs.crops))
            moved = model.offload.moved_bytes if model.offload is not None else 0
            error = None if expected is None else expected / peak[0] - 1
            rows.append({"options": name, "tokens": size, "crops": len(inputs.crops), "peak": peak[0]})
            rows[-1] |= {"planner": expected, "error": error, "on host": moved}
            if model.offload is not None:
                model.offload.moved_bytes = 0
            print(f"{name}, {size} tokens: {peak[0] / 2**20:.0f} MiB", flush=True)
        del model
    return rows


def show(rows: list[dict[str, Any]], sizes: list[int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Peak memory of a step, MiB", caption="of the last length: share of the first row, planner's error"
    )
    table.add_column("memory.*")
    for size in sizes:
        table.add_column(f"{size:,}", justify="right")
    table.add_column("share", justify="right")
    table.add_column("planner", justify="right")
    found = {(r["options"], r["tokens"]): r for r in rows}
    for name in dict.fromkeys(r["options"] for r in rows):
        last, first = found[name, sizes[-1]], found[rows[0]["options"], sizes[-1]]
        peaks = [f"{found[name, size]['peak'] / 2**20:,.0f}" for size in sizes]
        error = "-" if last["error"] is None else f"{last['error']:+.0%}"
        table.add_row(name, *peaks, f"{last['peak'] / first['peak']:.2f}", error)
    Console().print(table)


def start() -> None:
    """One process that is a group of its own."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("narrow", "4b", "8b", "o7b"), default="4b" if cuda else "narrow")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4608, 9216, 18432, 36864])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--video", type=int, default=None if cuda else SHORT_VIDEO, help="most tokens of a video")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    from molmo2_nemo import cpu
    from molmo2_nemo.nemo.start import start_nemo
    from molmo2_nemo.processes import quiet

    quiet()
    cpu.enable(1)
    start_nemo()
    start()
    model = narrow(args.layers) if args.model == "narrow" else with_layers(preset(args.model), args.layers)
    subject = Subject(model, "cuda" if cuda else "cpu", getattr(torch, args.dtype))
    rows = measure(subject, args.sizes, args.options, args.video)
    show(rows, args.sizes)
    settings = {"model": args.model, "layers": args.layers, "dtype": args.dtype, "longest video": args.video}
    write_result("memory", {"machine": machine(), "settings": settings, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
