"""Whole training steps of a stage, by the product's own trainer: time, MFU by mask area, peak memory.

    python -m benchmarks.train_step --model 4b --layers 2 6 --check 10              one GPU
    torchrun --nproc-per-node 8 -m benchmarks.train_step --model 8b --layers 36     the full depth on eight
    torchrun --nproc-per-node 8 -m benchmarks.train_step --model 8b --layers 8 16 parallel.tensor=2 parallel.context=4
    python -m benchmarks.train_step --tiny                                          CPU: that the script works

Everything is `molmo2 train`'s: NeMo's trainer, Megatron's distributed optimizer, the recipe's settings, and whatever
overrides follow on the command line (layout, memory.*, model.attention, ...). Only three things are not: packs are made
up (tests/support/batches.py: `sft` 16,384 tokens and 128 crops of the shape of stage 2, `long` one video of 384 frames
in 36,864 tokens), the decoder has as many layers as --layers says, and nothing is saved.

With two numbers of layers, time and memory are taken to be linear in it and given for the model's full depth as well;
a table says which figures are measured and which extrapolated. --check measures
one more depth and says how far it lies from that line. Without settings for `parallel`, up to eight processes
share each pack, and more are replicas; with some, the others are 1. A step has --micro-batches forward passes on every
replica, where training at the published batch sizes has more: the optimizer's share is smaller there.

`log.profile=[4,5]` profiles steps 4 and 5 (warm-up steps count) of every stage and depth, see docs/running.md. They are
left out of the medians, if others are left.

Times are medians over --steps steps after --warmup. MFU counts what the model needs (cost/flops.py): allowed pairs,
scored tokens, no padding, no recomputation. Beside them stands what `molmo2 plan` predicts for the same packs, layers
and settings on this device: seconds, and bytes without its allowances for the runtime and fragmentation, which the peak
of allocated memory does not hold either.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import machine, write_result
from molmo2_nemo.cost.workload import Workload
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.example import Batch
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import Molmo2Config, preset, with_options
from molmo2_nemo.settings.run import RunConfig

TINY = {"sft": (512, 48), "long": (768, 48)}  # tokens and crops of --tiny


def settings(model: str, stage: str, world: int, overrides: Sequence[str], micro_batches: int) -> RunConfig:
    """The recipe's settings for this many processes.

    Raises:
        UserError: the layout does not fit the number of processes.
    """
    from molmo2_nemo.settings.compose import compose

    layout = [] if any(o.startswith("parallel=") for o in overrides) else ["parallel=single"]
    if not any(o.startswith("parallel") for o in overrides):
        layout.append(f"parallel.context={min(8, world)}")
    cfg = compose([f"recipe={model}", f"stage={stage}", *layout, *overrides])
    if model == "tiny" and not any(o.startswith("data.packing") for o in overrides):
        cfg.data.packing.sequence_length, cfg.data.packing.max_crops = TINY[stage]
    parallel, cfg.init_from, cfg.validation.sources = cfg.parallel, None, {}
    replica = parallel.tensor * parallel.context * parallel.pipeline
    if world % replica:
        raise UserError(f"{world} processes: expected a multiple of tensor * context * pipeline = {replica}")
    if parallel.dynamic_context:
        raise UserError("parallel.dynamic_context: this benchmark assigns its packs itself; leave it off")
    parallel.data = world // replica
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cfg.cluster.nodes, cfg.cluster.devices = world // devices, devices
    cfg.stage.global_batch_size = cfg.stage.micro_batch_size * parallel.data * micro_batches
    cfg.log.tensorboard, cfg.log.wandb = False, None
    return cfg


class Noise:
    """A loader that repeats one step's made-up micro-batches of this replica for ever."""

    def __init__(self, cfg: RunConfig, model: Molmo2Config, rank: int, size: int) -> None:
        from tests.support.batches import Shapes, batch

        shapes, packing, packs = Shapes(model), cfg.data.packing, cfg.stage.micro_batch_size
        length = packing.sequence_length
        self.batches: list[Batch] = []
        for number in range(cfg.stage.global_batch_size // (packs * size)):
            seed = number * size + rank
            rng = np.random.default_rng(seed)
            if cfg.stage.name == "sft":
                rows = [shapes.mixed(rng, length, packing.max_crops) for _ in range(packs)]
            else:
                rows = [shapes.videos(length, length) for _ in range(packs)]
            self.batches.append(batch(rows, length, model, seed))

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.batches


def planned(cfg: RunConfig, model: Molmo2Config, work: Workload, world: int) -> dict[str, float]:
    """What the planner predicts for a step: GiB of a process, and seconds where the device is known. Nothing for
    settings that it does not plan with."""
    from molmo2_nemo.cost.hardware import Cluster
    from molmo2_nemo.cost.step import DEFAULT_DEVICE
    from molmo2_nemo.plan.memory import GIB
    from molmo2_nemo.plan.search import configured
    from molmo2_nemo.training.step_log import this_device

    device = this_device()
    found = configured(cfg, model, work, Cluster(device or DEFAULT_DEVICE, world, 1))
    if found is None:
        return {}
    memory = {"memory_gib": found.memory.counted / GIB}
    return memory | ({"seconds": found.step.seconds} if device else {})


def workload_of(cfg: RunConfig, model: Molmo2Config, batches: Sequence[Batch]) -> Workload:
    """The average pack of these micro-batches."""
    counts = [PackCounts.of(batch, model.visual_attention, model.text.vocab_size) for batch in batches]
    packs, length = sum(c.packs for c in counts), cfg.data.packing.sequence_length
    total = {n: sum(getattr(c, n) for c in counts) / packs for n in ("tokens", "pairs", "crops", "scored")}
    return Workload(
        packs=cfg.stage.global_batch_size,
        steps=cfg.stage.max_steps,
        length=length,
        tokens=total["tokens"],
        area=total["pairs"] / length**2,
        crops=total["crops"],
        max_crops=max(c.crops // c.packs for c in counts),
        scored=total["scored"],
    )


def with_layers(model: Molmo2Config, layers: int) -> Molmo2Config:
    """The model with another number of decoder layers; of those with YaRN the first ones."""
    text = model.text
    yarn = replace(text.yarn, layers=tuple(i for i in text.yarn.layers if i < layers)) if text.yarn else None
    return replace(model, text=replace(text, num_layers=layers, yarn=yarn))


def train(cfg: RunConfig, model: Molmo2Config, steps: int, warmup: int, profiles: Path) -> dict[str, Any]:
    """Trains a few steps on every rank; medians, on rank 0 (elsewhere nothing).

    Args:
        profiles: where those of log.profile are kept, in a folder for each stage and number of layers.
    """
    import fiddle
    import torch
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    from molmo2_nemo.nemo.recipes import stage_recipe
    from molmo2_nemo.rundir.lines import read_metrics
    from molmo2_nemo.rundir.paths import PROFILE, stage_dir
    from molmo2_nemo.settings.checks import profile_problems

    with tempfile.TemporaryDirectory(prefix="molmo2-") as folder:
        cfg.output_dir, cfg.stage.max_steps = folder, warmup + steps
        stage_dir(cfg).mkdir(parents=True)
        for problem in profile_problems(cfg):
            raise UserError(problem)
        recipe = stage_recipe(cfg)
        recipe.model.model = with_options(model, **cfg.model.options())
        recipe.log.ckpt, recipe.resume, recipe.trainer.enable_checkpointing = None, None, False
        run_stage = fiddle.build(recipe)
        data = run_stage.keywords["data"]
        loaders: list[Noise] = []

        def loader() -> Noise:
            rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
            loaders.append(Noise(cfg, model, rank, size))
            return loaders[-1]

        data.packs._open = lambda _: loader()
        before = 0.0  # GiB: PyTorch's compiled code holds on to the weights of a model that was trained before
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        run_stage()
        lines = read_metrics(stage_dir(cfg))[warmup:]
        lines = [line for line in lines if not is_profiled(cfg, line["step"])] or lines
        if (stage_dir(cfg) / PROFILE).is_dir():
            kept = profiles / f"{cfg.stage.name}-{model.text.num_layers}-layers"
            shutil.copytree(stage_dir(cfg) / PROFILE, kept, dirs_exist_ok=True)
    del run_stage, data, recipe
    unset_num_microbatches_calculator()  # the next stage has another
    gc.collect()  # the trainer and its model refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if int(os.environ.get("RANK", "0")):
        return {}
    found = {name: statistics.median(line[name] for line in lines) for name in ("seconds", "wait", "memory_gib")}
    found["memory_gib"] -= before
    work = lines[0]["tflops"] * lines[0]["seconds"]  # of each process; the same in every step
    found |= {"tflop": work, "tokens": lines[0]["tokens"], "crops": lines[0]["crops"], "loss": lines[-1]["loss"]}
    print(f"{cfg.stage.name}, {model.text.num_layers} layers: {found}", flush=True)
    return found | {"work": workload_of(cfg, model, loaders[0].batches)}


def is_profiled(cfg: RunConfig, step: int) -> bool:
    """Whether the profiler, which takes time itself, is at work in a step."""
    return cfg.log.profile is not None and cfg.log.profile[0] <= step <= cfg.log.profile[1]


def profile_of(profiles: Path, stage: str, layers: int) -> str | None:
    """The table of a depth's profile, where there is one."""
    tables = sorted((profiles / f"{stage}-{layers}-layers").glob("*.txt"))
    return tables[0].read_text() if tables else None


def at_depth(measured: dict[int, dict[str, Any]], layers: int) -> dict[str, Any]:
    """Seconds, memory and operations of a model with that many layers: measured, or on the line through two others.

    Raises:
        UserError: that depth was not measured, and fewer than two others were, so it cannot be extrapolated.
    """
    return measured[layers] if layers in measured else on_line(measured, layers)


def on_line(measured: dict[int, dict[str, Any]], layers: int) -> dict[str, float]:
    """What the line through the lowest and the highest depth says of another."""
    if len(measured) < 2:
        raise UserError(f"--layers needs two numbers to extrapolate to {layers} layers")
    low, high = min(measured), max(measured)
    share = (layers - low) / (high - low)
    return {
        name: measured[low][name] + share * (measured[high][name] - measured[low][name])
        for name in ("seconds", "memory_gib", "tflop")
    }


def stage_result(cfg: RunConfig, args: argparse.Namespace, world: int) -> dict[str, Any]:
    """All depths of one stage."""
    from molmo2_nemo.training.step_log import known_peak

    full = preset(cfg.model.preset)
    depths = sorted({*args.layers, *args.check})
    measured = {n: train(cfg, with_layers(full, n), args.steps, args.warmup, args.profiles) for n in depths}
    if int(os.environ.get("RANK", "0")):
        return {}
    peak = cfg.log.peak_tflops or known_peak(cfg.cluster.precision == "fp8")
    return {
        "tokens": cfg.data.packing.sequence_length,
        "crops": cfg.data.packing.max_crops,
        "packs per step": cfg.stage.global_batch_size,
        "processes": world,
        "layout": {k: v for k, v in vars(cfg.parallel).items() if v not in (None, False)},
        "memory": dict(vars(cfg.memory)),
        "attention": cfg.model.attention,
        "precision": cfg.cluster.precision,
        "peak tflops": peak,
        "profile": profile_of(args.profiles, cfg.stage.name, depths[-1]) if cfg.log.profile else None,
        "layers": rows(cfg, full, measured, args.layers, peak, world),
    }


def rows(
    cfg: RunConfig,
    full: Molmo2Config,
    measured: dict[int, dict[str, Any]],
    line: Sequence[int],
    peak: float | None,
    world: int,
) -> dict[int, dict[str, Any]]:
    """By depth: what was measured or is on the line, rates, what the planner says, how far a check is off the line.

    Args:
        line: the depths that the line goes through.
    """
    drawn = {n: measured[n] for n in set(line)}
    works = [row.pop("work") for row in measured.values()]  # the same packs at every depth
    found = {}
    for layers in sorted({*measured, *([full.text.num_layers] if len(drawn) > 1 else [])}):
        row = at_depth(measured, layers) if layers in measured else on_line(drawn, layers)
        rate = row["tflop"] / row["seconds"]
        row = row | {"tflops": rate, "mfu": rate / peak if peak else None, "measured": layers in measured}
        row["tokens_per_second"] = works[0].tokens * works[0].packs / row["seconds"]
        row["planned"] = planned(cfg, with_layers(full, layers), works[0], world)
        if layers in measured and layers not in drawn and len(drawn) > 1:
            expected = on_line(drawn, layers)
            row["off the line"] = {n: row[n] / expected[n] - 1 for n in ("seconds", "memory_gib")}
        found[layers] = row
    return found


def show(model: str, results: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Training steps of {model}", caption="TFLOP/s and memory per process; ~ extrapolated")
    for name in HEADINGS:
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, result in results.items():
        for layers, row in result["layers"].items():
            table.add_row(stage, f"{result['tokens']:,}", *cells(result, layers, row))
    Console(width=110).print(table)
    for stage, result in results.items():
        for layers, row in result["layers"].items():
            if off := row.get("off the line"):
                found = f"{off['seconds']:+.1%} of the time, {off['memory_gib']:+.1%} of the memory"
                print(f"{stage}: {layers} layers lie {found} off the line through the others")


HEADINGS = (
    "stage",
    "tokens",
    "packs",
    "layers",
    "seconds",
    "planner",
    "tokens/s",
    "TFLOP/s",
    "MFU",
    "peak GiB",
    "planner",
)


def cells(result: dict[str, Any], layers: int, row: dict[str, Any]) -> list[str]:
    """A row of the table from its third column on; ~ marks what is on the line instead of measured."""
    mark, plan = "" if row["measured"] else "~", row["planned"]
    mfu = "-" if row["mfu"] is None else f"{mark}{row['mfu']:.1%}"
    return [
        str(result["packs per step"]),
        str(layers),
        f"{mark}{row['seconds']:.3f}",
        f"{plan['seconds']:.3f}" if "seconds" in plan else "-",
        f"{mark}{row['tokens_per_second']:,.0f}",
        f"{mark}{row['tflops']:.3g}",
        mfu,
        f"{mark}{row['memory_gib']:.2f}",
        f"{plan['memory_gib']:.2f}" if "memory_gib" in plan else "-",
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("4b", "8b", "o7b"), default="4b")
    parser.add_argument("--tiny", action="store_true", help="the tiny model and short packs, for CPU")
    parser.add_argument("--stages", nargs="+", choices=("sft", "long"), default=["sft", "long"])
    parser.add_argument("--layers", type=int, nargs="+", help="decoder layers; default 4 8, with --tiny 2 4")
    parser.add_argument("--check", type=int, nargs="+", default=[], help="depths that the line is compared with")
    parser.add_argument("--profiles", type=Path, default=Path("profiles"), help="folder for what log.profile makes")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args, overrides = parser.parse_known_args(arguments)
    if unknown := [o for o in overrides if o.startswith("-") or "=" not in o]:
        parser.error(f"{unknown[0]}: neither an option nor an override such as parallel.tensor=2")
    args.layers = args.layers or ([2, 4] if args.tiny else [4, 8])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = "tiny" if args.tiny else args.model

    from molmo2_nemo import cpu
    from molmo2_nemo.nemo.start import start_nemo
    from molmo2_nemo.processes import quiet

    quiet()
    cpu.enable(1)
    start_nemo()
    results = {}
    for stage in args.stages:
        cfg = settings(model, stage, world, overrides, args.micro_batches)
        results[stage] = stage_result(cfg, args, world)
    if int(os.environ.get("RANK", "0")):
        return {}
    show(model, results)
    kept = {"model": model, "steps": args.steps, "warmup": args.warmup, "overrides": list(overrides), "stages": results}
    write_result("train_step", {"machine": machine()} | kept, args.out)
    return kept


if __name__ == "__main__":
    main()
