"""Whether this machine has the memory and the devices that a run takes: found before anything is loaded.

The planner's bytes (plan/memory.py) are held against a GPU's memory or, where there is none, against what the host has
free. A run that is small beside the host is let through without asking torch for devices, which takes seconds.
"""

from __future__ import annotations

import copy
import ctypes
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from molmo2_nemo.cost.hardware import DEVICES, Cluster
from molmo2_nemo.cost.workload import workload
from molmo2_nemo.errors import plural, sized
from molmo2_nemo.launch.out_of_memory import CHUNK
from molmo2_nemo.model.config import PRESETS
from molmo2_nemo.plan.layouts import layout_of, number_formats
from molmo2_nemo.plan.memory import GIB, Memory, memory
from molmo2_nemo.plan.words import model_of, nearest_device, plan_words
from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.sizes import wanted_processes

SMALL = 0.25  # of the host's free memory: less is not looked into
SURE = 1.1  # times a GPU's memory: the planner is taken to be right within a tenth
PROCESS = 1.0 * GIB  # libraries of a process on the CPU
CGROUP = (  # limit and use of a container or job, of both kinds of control groups
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
ANYWAY = "cluster.check_memory=false starts it anyway"


@dataclass(frozen=True)
class Machine:
    """What a node has."""

    gpus: tuple[float, ...]  # bytes of each; empty: none
    host: float  # bytes that are free, or that this job may still take


def capacity_problems(cfg: RunConfig, processes: int | None = None, here: Machine | None = None) -> Iterator[str]:
    """Why this machine cannot hold its share of the run, in one sentence with what would fit; nothing where it can.

    Args:
        processes: of the run on this machine; None: as the settings have it.
        here: for tests; None: this machine.
    """
    if not cfg.cluster.check_memory or cfg.model.preset not in PRESETS or _sizes(cfg) < 1:
        return
    count = wanted_processes(cfg) // max(1, cfg.cluster.nodes) if processes is None else processes
    on_host = count * needed(cfg, gpu=False)
    if here is None:
        free = free_host_memory()
        if on_host < SMALL * free:
            return
        here = Machine(gpu_memory(), free)
    if here.gpus:
        yield from _on_gpus(cfg, count, here)
    elif on_host > here.host:
        yield _on_cpu(cfg, count, on_host, here)


def _sizes(cfg: RunConfig) -> int:
    """The least of the numbers that must be positive; settings/checks.py names those that are not."""
    p, stage, packing = cfg.parallel, cfg.stage, cfg.data.packing
    sizes = (p.tensor, p.context, p.pipeline, p.data, cfg.cluster.nodes, stage.micro_batch_size)
    return min(*sizes, stage.global_batch_size, packing.sequence_length, packing.max_crops)


def _on_cpu(cfg: RunConfig, count: int, bytes_: float, here: Machine) -> str:
    fits = what_fits(cfg, here.host / count, gpu=False)
    tiny = cfg.model.preset == "tiny"
    ways = f"By the planner this fits: {' '.join(fits)}" if fits else "No setting of memory.* makes it fit"
    ways += "; shorter packs take less (data.packing.sequence_length), fewer processes too (parallel.*)" if tiny else ""
    rest = "" if tiny else f"; recipe=tiny runs here. {_command(cfg)} shows what it needs of GPUs"
    if not (tiny or cfg.stage.lora.rank):
        rest += ", and scale=gpu_lora takes one with 80 GB"
    return (
        f"no GPU here that torch can use, and on the CPU {_what(cfg)} takes at least {sized(bytes_)} of memory in "
        f"{plural(count, 'process', 'processes')}, of which {sized(here.host)} are free. {ways}{rest}. {ANYWAY}"
    )


def _command(cfg: RunConfig, here: Machine | None = None) -> str:
    """The plan of this run, on the GPUs that are here or on those that its own layout is for."""
    cluster = None
    if here is not None:
        cluster = Cluster(DEVICES[nearest_device(min(here.gpus))], len(here.gpus), max(1, cfg.cluster.nodes))
    return shlex.join(["molmo2", "plan", *plan_words(cfg, cluster)])


def _on_gpus(cfg: RunConfig, count: int, here: Machine) -> Iterator[str]:
    if count > len(here.gpus):
        yield (
            f"the layout takes {plural(count, 'GPU', 'GPUs')} on this node, here: {len(here.gpus)}. Use a smaller one "
            f"(parallel.*): {_command(cfg, here)}"
        )
        return
    yield from _on_host(cfg, count, here)
    bytes_, least = needed(cfg, gpu=True), min(here.gpus[:count])
    if bytes_ <= SURE * least:
        return
    fits = what_fits(cfg, least, here.host / count)
    ways = f"By the planner this fits: {' '.join(fits)}" if fits else "No setting of memory.* makes it fit"
    yield (
        f"{_what(cfg)} needs {sized(bytes_)} of GPU memory by the planner, {sized(least)} are here. {ways}; other "
        f"layouts: {_command(cfg, here)}; less of the model on one GPU: scale=gpu_frozen_vit, scale=gpu_lora. If you "
        f"know better, {ANYWAY}"
    )


def _on_host(cfg: RunConfig, count: int, here: Machine) -> Iterator[str]:
    bytes_ = count * offloaded(cfg)
    optimizer = count * _planned(cfg, gpu=True).host_optimizer
    if bytes_ + optimizer > here.host and optimizer:
        yield (
            f"memory.optimizer_offload=true keeps {sized(optimizer)} on this node's host for "
            f"{plural(count, 'process', 'processes')}"
            + (f", memory.offload=true at least {sized(bytes_)}" if bytes_ else "")
            + f"; {sized(here.host)} are free. More nodes share it, adapters (scale=gpu_lora) need little; {ANYWAY}"
        )
    elif bytes_ > here.host:
        yield (
            f"memory.offload=true keeps at least {sized(bytes_)} of pinned memory on this node's host for "
            f"{plural(count, 'process', 'processes')}, of which {sized(here.host)} are free. "
            f"memory.recompute_attention=true needs less of it, parallel.context=N less on each node; {ANYWAY}"
        )


def needed(cfg: RunConfig, *, gpu: bool) -> float:
    """Bytes of one process in the run's layout, as the planner counts them. Of settings that it does not know it takes
    those that need least."""
    found = _planned(cfg, gpu=gpu)
    parts = found.parts()
    if cfg.cluster.precision == "fp32":  # weights are their own masters; activations are twice as large
        twice = ("weights", "decoder", "vision", "exchange")
        parts |= {name: 2 * parts[name] for name in twice} | {"optimizer": parts["optimizer"] * 8 / 12}
    if not gpu:
        parts["runtime"] = PROCESS
    return sum(parts.values())


def offloaded(cfg: RunConfig) -> float:
    """Bytes of pinned host memory of one process that uses a GPU."""
    return _planned(cfg, gpu=True).host * (2 if cfg.cluster.precision == "fp32" else 1)


def _on_host_of(cfg: RunConfig) -> float:
    """Bytes of host memory of one process that uses a GPU, for saved tensors and the optimizer."""
    return offloaded(cfg) + _planned(cfg, gpu=True).host_optimizer


def _planned(cfg: RunConfig, *, gpu: bool) -> Memory:
    """The planner's bytes in bf16 for the run's layout."""
    sure = cfg.memory.recompute_layers is None and cfg.memory.recompute_modules == ["mlp"]
    recompute = cfg.memory.recompute if sure or cfg.memory.recompute == "none" else "full"
    layout = replace(
        layout_of(cfg, max(1, wanted_processes(cfg) // cfg.parallel.model_size)),
        recompute=recompute,
        offload=cfg.memory.offload and gpu,
        optimizer_offload=cfg.memory.optimizer_offload and gpu,
        recompute_attention=cfg.memory.recompute_attention and recompute == "full",
    )
    return memory(
        model_of(cfg),
        cfg.stage,
        workload(cfg),
        layout,
        cfg.memory,
        cfg.kernels if gpu else None,
        **number_formats(cfg),
    )


def what_fits(cfg: RunConfig, room: float, host: float = float("inf"), *, gpu: bool = True) -> list[str]:
    """Settings that save memory, those that cost least first, as many as it takes to fit into `room` bytes; empty where
    all together do not. On a GPU offload is one where its bytes fit into `host`, which a process has of the host's
    memory; on a CPU it saves nothing."""
    steps: tuple[tuple[str, str, object], ...] = (
        ("stage", "micro_batch_size", 1),
        ("memory", "loss_chunk", min(256, cfg.memory.loss_chunk)),
        ("memory", "recompute", "full"),
        ("memory", "vision_chunk", min(16, cfg.memory.vision_chunk or 16)),
        ("memory", "mlp_tiles", max(8, cfg.memory.mlp_tiles)),
        ("memory", "sequence_chunk", min(CHUNK, cfg.memory.sequence_chunk or CHUNK)),
        *((("memory", "offload", True), ("memory", "optimizer_offload", True)) if gpu else ()),
    )
    changed, taken = copy.deepcopy(cfg), list[str]()
    changed.memory.recompute_layers = None
    before = set(find_problems(changed, files=False))
    for group, key, value in steps:
        was = getattr(getattr(changed, group), key)
        if was == value:
            continue
        setattr(getattr(changed, group), key, value)
        too_much = key.endswith("offload") and _on_host_of(changed) > host
        if too_much or set(find_problems(changed, files=False)) - before:
            setattr(getattr(changed, group), key, was)
            continue
        taken.append(f"{group}.{key}={str(value).lower()}")
        if needed(changed, gpu=gpu) <= room:
            return taken
    return []


def free_host_memory() -> float:
    """Bytes that processes may still take here: what the system has available, or what is left of this job's limit."""
    found = [float("inf")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024.0)
    for limit, used in CGROUP:
        try:
            most = Path("/sys/fs/cgroup", limit).read_text().strip()
            found.append(float(most) - float(Path("/sys/fs/cgroup", used).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return max(0.0, min(found))


def gpu_memory() -> tuple[float, ...]:
    """Bytes of the GPUs that torch sees. It is not loaded, which takes seconds, where it could see none."""
    if "CUDA_VISIBLE_DEVICES" in os.environ and not os.environ["CUDA_VISIBLE_DEVICES"].strip():
        return ()
    if not has_driver():
        return ()
    import torch

    return tuple(float(torch.cuda.get_device_properties(n).total_memory) for n in range(torch.cuda.device_count()))


def has_driver() -> bool:
    """Whether there is a driver by which torch could reach a GPU: CUDA's library, or the device of AMD's kernel driver
    (https://rocm.docs.amd.com, /dev/kfd)."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def _what(cfg: RunConfig) -> str:
    trained = "adapters" if cfg.stage.lora.rank else cfg.stage.name
    return f"training the {cfg.model.preset} model ({trained}, {cfg.data.packing.sequence_length:,} tokens a pack)"
