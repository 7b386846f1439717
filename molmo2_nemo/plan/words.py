"""A run's settings in the words of `molmo2 plan`, and the GPUs that its own layout is for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from molmo2_nemo.cost.hardware import DEVICES, Cluster
from molmo2_nemo.cost.workload import workload
from molmo2_nemo.model.config import Molmo2Config, preset, with_options
from molmo2_nemo.plan.layouts import layout_of, number_formats
from molmo2_nemo.plan.memory import GIB, USABLE, memory
from molmo2_nemo.settings.compose import compose, group_options
from molmo2_nemo.settings.run import PUBLISHED_STAGES, RunConfig
from molmo2_nemo.settings.schema import by_dotted_key, to_dict
from molmo2_nemo.settings.sizes import wanted_processes

USUAL = ("h100", "h200", "b200")  # from small to large
NODE = 8  # GPUs of a usual node
# Beginnings of the keys that a plan depends on, or is refused by
READ = ("model.", "stage.", "parallel.", "memory.", "kernels.", "data.packing.", "data.image.", "data.video.")
UNREAD = ("stage.name", "stage.optim.", "parallel.data", "data.video.decoder")


def model_of(cfg: RunConfig) -> Molmo2Config:
    """The model that a plan is for."""
    chosen = cfg.model
    return with_options(
        preset(chosen.preset),
        rope_scaling=chosen.rope_scaling,
        rope_factor=chosen.rope_factor,
        rope_base=chosen.rope_base,
    )


def own_cluster(cfg: RunConfig) -> Cluster | None:
    """Nodes with as many GPUs as the run has processes, of the first of USUAL that has the memory for its own layout.
    None where there are more than a node's, or where no GPU has it."""
    nodes = max(1, cfg.cluster.nodes)
    count, left = divmod(wanted_processes(cfg), nodes)
    if left or not 1 <= count <= NODE:
        return None
    layout = layout_of(cfg, max(1, count * nodes // cfg.parallel.model_size))
    work = workload(cfg)
    total = memory(model_of(cfg), cfg.stage, work, layout, cfg.memory, cfg.kernels, **number_formats(cfg)).total
    for name in USUAL:
        if total <= USABLE * DEVICES[name].memory * GIB:
            return Cluster(DEVICES[name], count, nodes)
    return None


def nearest_device(bytes_: float) -> str:
    """The one of USUAL whose memory is nearest."""
    return min(USUAL, key=lambda name: abs(DEVICES[name].memory * GIB - bytes_))


def plan_words(cfg: RunConfig, cluster: Cluster | None = None) -> list[str]:
    """Words of a `molmo2 plan` of this run: recipe, scale and stage that are nearest to its settings, and what differs.

    Args:
        cluster: to plan for; None: the run's own, or one node of eight H100.
    """
    cluster = cluster or own_cluster(cfg) or Cluster(DEVICES["h100"], NODE, 1)
    stage = cfg.stage.name if cfg.stage.name in PUBLISHED_STAGES else "sft"
    start = [f"recipe={cfg.model.preset}"] if cfg.model.preset in group_options("recipe") else []
    wanted, found = _read(cfg), list[list[str]]()
    scales = [name for name in group_options("scale") if cfg.model.preset != "tiny"]
    scales.sort(key=lambda name: name.endswith("lora") != bool(cfg.stage.lora.rank))  # composing takes half a second
    for scale in ([], *([f"scale={name}"] for name in scales)):
        base = [*start, *scale, f"stage={stage}"]
        before = _read(compose(base))
        found.append(base + [f"{k}={_word(v)}" for k, v in wanted.items() if before.get(k, ...) != v])
        if found[-1] == base:  # no other is shorter
            break
    words = min(found, key=len) + [f"cluster={cluster.device.name}x{cluster.per_node}"]
    words += [f"nodes={cluster.nodes}"] if cluster.nodes > 1 else []
    return words + (["cluster.precision=fp8"] if cfg.cluster.precision == "fp8" else [])


def _read(cfg: RunConfig) -> dict[str, Any]:
    """The settings that a plan depends on, by dotted key."""
    values = by_dotted_key(to_dict(cfg))
    return {key: value for key, value in values.items() if key.startswith(READ) and not key.startswith(UNREAD)}


def _word(value: Any) -> str:
    """A value as the command line has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(_word, value))}]"
    text = str(value)
    return text if re.fullmatch(r"[\w.+/-]+", text) else f"'{text}'"
