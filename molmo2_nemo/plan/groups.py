"""Static and dynamic context groups on recorded packs, simulated: predicted seconds of an optimizer step.

Packs of a step are balanced over replicas by data/balance.py and, inside a replica, assigned by parallel/dynamic.py and
parallel/assignment.py: the code that training runs. With one pack per replica a step's packs are taken as they come
(data.packing.balance_window, which orders them, is left out). Left out, as it is the same for all: the gradients'
reduction and the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from molmo2_nemo.cost.context import ContextCost
from molmo2_nemo.cost.efficiency import Efficiency
from molmo2_nemo.cost.flops import pack_flops
from molmo2_nemo.cost.hardware import Cluster
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.step import StepCost
from molmo2_nemo.data.balance import UNIT, balance
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.errors import plural
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.parallel.assignment import assign, largest_load
from molmo2_nemo.parallel.dynamic import DynamicContext
from molmo2_nemo.parallel.partition import can_shard_heads, degrees
from molmo2_nemo.plan.recording import Recording
from molmo2_nemo.settings.run import RunConfig


@dataclass(frozen=True)
class Groups:
    """Context groups of `size` ranks; a rank may get such shares of a full pack's tokens and crops. Dynamic ones cut
    padding."""

    size: int
    dynamic: bool
    tokens: float = 1.0
    crops: float = 1.0
    cut: bool = True


@dataclass(frozen=True)
class Step:
    """The packs of an optimizer step, and the limits that they were packed with."""

    packs: list[PackCounts]
    tokens: int
    crops: int
    padded: bool = True  # to full length, without `cut`


def table_of(step: Step, cost: ContextCost, groups: Groups) -> np.ndarray:
    """Microseconds of each pack by degree, -1 where it does not fit; int64 [packs, degrees]."""
    context_tokens, context_crops = round(groups.tokens * step.tokens), round(groups.crops * step.crops)
    context = DynamicContext(cost, groups.size, 0, context_tokens, context_crops)
    if groups.dynamic:
        return context.table(step.packs)
    packs = step.packs
    if step.padded and not groups.cut:
        packs = [replace(p, tokens=step.tokens * p.packs, length=step.tokens) for p in packs]  # padding is worked on
    found = np.full((len(packs), len(degrees(groups.size))), -1, np.int64)
    found[:, -1] = [cost.microseconds(pack, groups.size) for pack in packs]
    return found


def work_of(pack: PackCounts, model_config: Molmo2Config) -> int:
    """What training balances micro-batches by: whole megaFLOPs, as data/balance.py has them of a batch."""
    return round(pack_flops(model_config, pack).total / UNIT)


def step_seconds(costs: np.ndarray, work: np.ndarray, gpus: int, groups: Groups) -> float:
    """The slowest replica of one step; costs [k, degrees] as `table_of` has them, work [k]."""
    replicas, sizes = gpus // groups.size, degrees(groups.size)
    usable = len(costs) // replicas * replicas
    slowest = 0
    for mine in balance(work[:usable].reshape(replicas, -1)):
        if groups.dynamic:
            slowest = max(slowest, largest_load(assign(costs[mine], sizes), costs[mine], sizes))
        else:
            slowest = max(slowest, int(costs[mine, -1].sum()))
    return slowest * 1e-6


@dataclass(frozen=True)
class Simulated:
    """Predicted steps of recorded packs.

    Args:
        seconds: of a step on average, by the name of the groups; the first are padded static ones.
        left_out: why other sizes are not there.
    """

    packs: int
    steps: int
    seconds: dict[str, float]
    left_out: list[str]


def simulate(
    cfg: RunConfig, model_config: Molmo2Config, recording: Recording, cluster: Cluster, efficiency: Efficiency
) -> Simulated:
    """Groups of a node, and of four, on a cluster: whole layers recomputed, heads shared inside a node.

    Raises:
        UserError: fewer packs than a step has.
    """
    head, heads = recording.head, model_config.text
    steps = [
        Step(packs, head["sequence_length"], head["max_crops"])
        for packs in recording.steps(cfg.stage.global_batch_size)
    ]
    node, found, left_out = cluster.per_node, dict[str, float](), list[str]()
    work = [np.array([work_of(pack, model_config) for pack in step.packs], np.int64) for step in steps]
    cost = ContextCost(
        StepCost(
            model_config,
            cfg.stage.trainable(model_config),
            cluster.device,
            node,
            efficiency,
            cfg.memory,
            fp8=cfg.cluster.precision == "fp8",
        ),
        Layout(recompute="full", ring_balance=cfg.parallel.ring_balance),
        ulysses=node,
    )
    for size in (node, 4 * node):
        replicas, left = divmod(cluster.gpus, size)
        if not can_shard_heads(heads.num_heads, heads.num_kv_heads, node):
            left_out.append(f"{size} ranks: {node} of a node cannot share {heads.num_heads} heads")
        elif left or replicas < 1:
            left_out.append(f"{size} ranks: do not divide {plural(cluster.gpus, 'GPU')}")
        elif len(steps[0].packs) % replicas:
            packs = plural(len(steps[0].packs), "pack")
            left_out.append(f"{size} ranks: {replicas} replicas do not divide {packs}")
        else:
            for name, groups in (
                (f"static {size}", Groups(size, False, cut=False)),
                (f"static {size}, padding cut", Groups(size, False)),
                (f"dynamic {size}", Groups(size, True)),
                (f"dynamic {size}, 1/{size} of the crops", Groups(size, True, crops=1 / size)),
            ):
                each = [
                    step_seconds(table_of(s, cost, groups), w, cluster.gpus, groups)
                    for s, w in zip(steps, work, strict=True)
                ]
                found[name] = float(np.mean(each))
    return Simulated(len(steps[0].packs), len(steps), found, left_out)
