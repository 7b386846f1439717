"""Peak memory of one training step from 36,864 to 1,048,576 tokens: whole layers beside layers in chunks
(`memory.sequence_chunk`).

    python -m benchmarks.sequence_chunk [--sizes 36864 147456 ...] [--chunk 4096] [--document 256] [--out FILE]

One step is forward and backward of the whole model on one process, fp32, on the CPU; every tensor's storage is counted
while it runs (tests/support/memory.py), what offload keeps on the host is left out, and parameters, their gradients and
the pack are there before. So that a million tokens are done in minutes, packs are text: documents of `--document`
tokens one behind the other, which attend to themselves. Memory does not depend on that (no kernel makes anything of
S x S elements), and a result file of benchmarks/memory.py has videos. The model is narrow, 2 layers with the 8B's
proportions.

Both ways have the same other settings: full recomputation with attention, tiled MLPs, and offload, so that of the kept
layers nothing is on the device but those on their way back. Losses and largest gradients of both are compared in the
same run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import start
from benchmarks.report import machine, write_result
from molmo2_nemo.model.config import MemoryConfig
from tests.support.batches import batch
from tests.support.memory import Subject, build, counting, narrow, predicted
from tests.support.trees import Tree

SIZES = [36864, 147456, 524288, 1048576]
LEAN: dict[str, Any] = {"recompute": "full", "recompute_attention": True, "mlp_tiles": 8, "offload": True}


def measure(subject: Subject, options: MemoryConfig, name: str, size: int, document: int) -> dict[str, Any]:
    from molmo2_nemo.model.inputs import PackInputs

    model = build(subject, options)
    trees = [Tree((document,))] * (size // document)
    inputs = PackInputs.from_batch(batch([trees], size, subject.model), subject.device)
    begun = time.process_time()
    with counting(subject.device) as peak:
        loss = model(inputs).loss
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if n.startswith("decoder.")}
    row = {"layers": name, "tokens": size, "peak": peak[0], "planner": predicted(subject, options, size, 0)}
    row |= {"processor seconds": round(time.process_time() - begun, 1), "loss": float(loss)}
    return row | {"gradients": {n: float(g.double().norm()) for n, g in grads.items()}}


def picture(rows: list[dict[str, Any]], path: Path, chunk: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(row["layers"] for row in rows):
        mine = [row for row in rows if row["layers"] == name]
        axes.plot([r["tokens"] for r in mine], [r["peak"] / 2**20 for r in mine], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the pack", ylabel="peak of a step, MiB")
    axes.set_title(f"Whole layers, and layers in chunks of {chunk:,} tokens")
    axes.set_xticks([r["tokens"] for r in rows], [f"{r['tokens']:,}" for r in rows])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--document", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    from molmo2_nemo import cpu

    cpu.enable(1)
    cpu.enable_megatron()
    start()
    subject = Subject(narrow(args.layers), "cpu", torch.float32)
    ways = {"whole": MemoryConfig(**LEAN), "chunks": MemoryConfig(**LEAN, sequence_chunk=args.chunk)}
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        for name, options in ways.items():
            rows.append(measure(subject, options, name, size, args.document))
            peak, seconds = rows[-1]["peak"] / 2**20, rows[-1]["processor seconds"]
            print(f"{name}, {size:,} tokens: {peak:,.0f} MiB, {seconds} s", flush=True)
        whole, chunks = rows[-2:]
        for key, norm in whole["gradients"].items():
            assert abs(chunks["gradients"][key] / norm - 1) < 1e-4, (size, key)
        assert abs(chunks["loss"] / whole["loss"] - 1) < 1e-5
    for row in rows:
        del row["gradients"]
    settings = {"layers": args.layers, "chunk": args.chunk, "document": args.document, "dtype": "float32", **LEAN}
    path = write_result("sequence_chunk", {"machine": machine(), "settings": settings, "rows": rows}, args.out)
    picture(rows, path.with_suffix(".png"), args.chunk)


if __name__ == "__main__":
    main()
