"""What it costs to build a model before training: fresh weights, or those that a checkpoint will bring.

    python -m benchmarks.startup [--model 4b] [--layers 2] [--blocks 2] [--repeats 5] [--out FILE]

The preset's widths with a few decoder layers and encoder blocks, fp32 on CPU, one thread. Three ways, in turns:

    twice        Megatron and torch draw every weight, then all are drawn again by their names (as before 2026-11-28)
    once         drawn by their names only: a fresh run
    checkpoint   none is drawn; what a checkpoint will bring is marked

Seconds of processor time, medians, and the ratios. Reading the checkpoint comes on top, and is the same either way.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import machine, write_result
from molmo2_nemo.model.config import MemoryConfig, Molmo2Config, preset
from molmo2_nemo.settings.run import ParallelConfig, StageConfig

WAYS = ("twice", "once", "checkpoint")


def smaller(model: Molmo2Config, layers: int, blocks: int) -> Molmo2Config:
    """The model with fewer layers, of the same widths."""
    vision = replace(model.vision, num_layers=blocks, feature_layers=(-1, -2))
    text = replace(model.text, num_layers=layers, yarn=None)
    return replace(model, text=text, vision=vision)


def seconds(model: Molmo2Config, way: str) -> float:
    """Processor time to build the model one way."""
    from megatron.core.utils import init_method_normal
    from torch import nn

    from molmo2_nemo.model.linear import Linear
    from molmo2_nemo.training.model import build_model, megatron_config

    memory, parallel = MemoryConfig(), ParallelConfig()
    config = megatron_config(model, memory, parallel, precision="fp32", variable_length=False)
    undrawn = Linear.reset_parameters
    if way == "twice":
        config.init_method = config.output_layer_init_method = init_method_normal(config.init_method_std)
        Linear.reset_parameters = nn.Linear.reset_parameters  # type: ignore[method-assign]
    rest: dict[str, Any] = {"stage": StageConfig(), "memory": memory, "parallel": parallel, "seed": 1}
    start = time.process_time()
    try:
        built = build_model(model, config, **rest, loaded="all" if way == "checkpoint" else "nothing")
    finally:
        Linear.reset_parameters = undrawn  # type: ignore[method-assign]
    taken = time.process_time() - start
    del built
    gc.collect()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("4b", "8b", "o7b"), default="4b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    from molmo2_nemo import cpu
    from molmo2_nemo.inference.load import start_single_process

    cpu.enable(1)
    start_single_process()
    model = smaller(preset(args.model), args.layers, args.blocks)
    runs: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            runs[way].append(round(seconds(model, way), 2))
    medians = {way: statistics.median(times) for way, times in runs.items()}
    ratios = {way: round(medians["twice"] / medians[way], 2) for way in WAYS}
    for way in WAYS:
        print(f"{way:<11} {medians[way]:6.2f} s   {ratios[way]:5.1f} times as fast as twice   {runs[way]}")
    shape = {"model": args.model, "layers": args.layers, "blocks": args.blocks}
    write_result("startup", {"machine": machine()} | shape | {"seconds": runs, "ratios": ratios}, args.out)


if __name__ == "__main__":
    main()
