"""Every layout weighed: the best few, and for each other way to split the model why it loses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from molmo2_nemo.attention.automatic import automatic
from molmo2_nemo.cost.efficiency import EFFICIENCIES, SAME_EFFICIENCY, Efficiency
from molmo2_nemo.cost.hardware import Cluster
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.step import Step, step_time
from molmo2_nemo.cost.workload import Workload
from molmo2_nemo.data.config import FeatureCacheConfig
from molmo2_nemo.errors import UserError, plural
from molmo2_nemo.model.config import CANNOT_MERGE, Molmo2Config
from molmo2_nemo.plan.checks import check_cluster
from molmo2_nemo.plan.layouts import PLAIN_MODE, RECOMPUTE_MODES, layout_of, layouts, number_formats
from molmo2_nemo.plan.memory import GIB, USABLE, Memory, memory
from molmo2_nemo.settings.run import RunConfig

NEARLY = 1.01  # times a step's seconds: as fast
REASONS = {  # component of a step: why a layout loses that spends more on it
    "recompute": "recomputes activations",
    "imbalance": "one micro-batch per rank and step: ranks with costly packs are waited for",
    "bubble": "pipeline stages wait",
    "tensor": "tensor-parallel exchange",
    "context": "exchange of heads or keys",
    "gradients": "exchange of gradients",
    "disk": "reads features of the encoder",
    "host": "the optimizer works on the host",
}


@dataclass(frozen=True)
class Candidate:
    """A layout with what it needs and how long it takes."""

    layout: Layout
    memory: Memory
    step: Step

    def fits(self, cluster: Cluster) -> bool:
        return self.memory.total <= USABLE * cluster.device.memory * GIB


@dataclass(frozen=True)
class Plan:
    """What a search found for a cluster."""

    cluster: Cluster
    work: Workload
    best: list[Candidate]  # that fit, fastest first, one of each way to split (`_best_of_each`)
    others: list[tuple[Candidate, str]]  # with the reason each loses
    modes: list[Candidate]  # the best way to split, with every mode of recomputation
    configured: Candidate | None = None  # the run's own settings, where they make sense on this cluster
    unplaced: str | None = None  # why there is none
    why_cluster: str = ""  # where the cluster was not asked for
    first_epoch: Candidate | None = None  # the best, while features of the encoder are computed; None: none are kept


def search(
    cfg: RunConfig,
    model_config: Molmo2Config,
    work: Workload,
    cluster: Cluster,
    efficiency: Efficiency | None = None,
    keep: int = 3,
) -> Plan:
    """The best layouts for a run.

    Raises:
        UserError: nothing fits, and the message says what would; or the cluster's GPUs cannot compute as the run asks.
    """
    check_cluster(cfg, model_config, cluster)
    found = candidates(cfg, model_config, work, cluster, efficiency)
    if not found and cfg.parallel.fsdp != "none":
        raise UserError(
            f"parallel.fsdp={cfg.parallel.fsdp} shares parameters among several GPUs without tensor or pipeline "
            f"parallelism, and no such layout divides {plural(work.packs, 'pack')} over {cluster}; take more GPUs, or "
            "parallel.fsdp=none"
        )
    if not found:
        raise UserError(
            f"no layout of the {model_config.name} model divides {plural(work.packs, 'pack')} over {cluster}; change "
            "stage.global_batch_size, or take a number of nodes that divides it"
        )
    fitting, found = _fitting(cfg, model_config, work, cluster, efficiency, found)
    if not fitting:
        raise UserError(_what_would_fit(cfg, model_config, work, cluster, found))
    best = _best_of_each(fitting)
    ways = {_way(c.layout) for c in best}
    too_big = sorted((c for c in found if _way(c.layout) not in ways), key=lambda c: c.memory.total)
    others = [(c, _why_slower(c, best[0])) for c in best[keep:]]
    others += [(c, _why_too_big(c, cluster)) for c in _one_of_each(too_big)]
    modes = [
        weigh(cfg, model_config, work, cluster, replace(best[0].layout, **PLAIN_MODE | mode), efficiency)
        for mode in RECOMPUTE_MODES
        if _may(cfg, mode["recompute"]) and not (best[0].layout.fsdp and mode.get("offload"))
    ]
    mine = configured(cfg, model_config, work, cluster, efficiency)
    first = None
    if cfg.data.feature_cache.path is not None:
        data = replace(cfg.data, feature_cache=FeatureCacheConfig())
        first = weigh(replace(cfg, data=data), model_config, work, cluster, best[0].layout, efficiency)
    return Plan(cluster, work, best[:keep], others, modes, mine, unplaced(cfg, work, cluster), first_epoch=first)


def _fitting(
    cfg: RunConfig,
    model_config: Molmo2Config,
    work: Workload,
    cluster: Cluster,
    efficiency: Efficiency | None,
    found: list[Candidate] | None = None,
) -> tuple[list[Candidate], list[Candidate]]:
    """(layouts that fit, fastest first; all that these were looked for among). Where none fits as the run is set, those
    with the optimizer on the host or with FSDP.

    Args:
        found: the run's `candidates`, where they are known.
    """

    def fast(those: list[Candidate]) -> list[Candidate]:
        return sorted((c for c in those if c.fits(cluster)), key=lambda c: c.step.seconds)

    found = candidates(cfg, model_config, work, cluster, efficiency) if found is None else found
    fitting = fast(found)
    if fitting or cfg.cluster.precision != "bf16":
        return fitting, found
    again = candidates(cfg, model_config, work, cluster, efficiency, optimizer_offload=True)
    again += candidates(cfg, model_config, work, cluster, efficiency, fsdp=True)
    fitting = fast(again)
    return fitting, again if fitting else [*found, *again]


def configured(
    cfg: RunConfig, model_config: Molmo2Config, work: Workload, cluster: Cluster, efficiency: Efficiency | None = None
) -> Candidate | None:
    """The layout that the run's settings have, replicas filling the cluster; None where `unplaced` says why."""
    if unplaced(cfg, work, cluster) is not None:
        return None
    return weigh(cfg, model_config, work, cluster, layout_of(cfg, cluster.gpus // cfg.parallel.model_size), efficiency)


def unplaced(cfg: RunConfig, work: Workload, cluster: Cluster) -> str | None:
    """Why a plan cannot show the run's own settings: it does not cover one of them, or they do not divide the cluster
    evenly. None where it can."""
    p, m = cfg.parallel, cfg.memory
    if m.recompute == "selective" and m.recompute_modules != ["mlp"]:
        return f"memory.recompute_modules=[{','.join(m.recompute_modules)}] is not planned with, only [mlp]"
    if m.recompute_layers is not None:
        return f"memory.recompute_layers={m.recompute_layers} is not planned with, only whole stages (null)"
    if not p.distributed_optimizer:
        return "parallel.distributed_optimizer=false is not planned with"
    if m.offload and m.recompute != "full":
        return f"memory.offload=true is planned with memory.recompute=full, not with {m.recompute}"
    replicas, left = divmod(cluster.gpus, p.model_size)
    if left or replicas == 0:
        return f"one replica of parallel.* takes {p.model_size} GPUs, which do not divide {cluster.gpus}"
    micro = cfg.stage.micro_batch_size
    if p.fsdp != "none" and not layout_of(cfg, replicas).may_shard:
        return f"parallel.fsdp={p.fsdp} does not go with the run's other settings on {cluster}"
    if work.packs % (replicas * micro):
        do = "does" if replicas == 1 else "do"
        return (
            f"{plural(replicas, 'replica')} with stage.micro_batch_size={micro} {do} not divide "
            f"stage.global_batch_size={work.packs}"
        )
    return None


def candidates(
    cfg: RunConfig,
    model_config: Molmo2Config,
    work: Workload,
    cluster: Cluster,
    efficiency: Efficiency | None,
    *,
    optimizer_offload: bool = False,
    fsdp: bool = False,
) -> list[Candidate]:
    """Every layout weighed, with the optimizer on the host where the run or `optimizer_offload` says so, and likewise
    with sharded parameters those that can have them."""
    on_host = optimizer_offload or cfg.memory.optimizer_offload
    fsdp = fsdp or cfg.parallel.fsdp == "megatron"
    return [
        weigh(cfg, model_config, work, cluster, replace(layout, optimizer_offload=on_host, fsdp=fsdp), efficiency)
        for layout in layouts(model_config, cluster, work.packs, work.length, cfg.parallel.cp_comm_type)
        if (not fsdp or replace(layout, optimizer_offload=on_host).may_shard and cfg.memory.sequence_chunk is None)
        and (cfg.model.attention not in CANNOT_MERGE or layout.ulysses == layout.context)
        and _may(cfg, layout.recompute)
    ]


def _may(cfg: RunConfig, recompute: str) -> bool:
    """Whether the run's layers may be recomputed that way: those that work in chunks are recomputed whole."""
    return cfg.memory.sequence_chunk is None or recompute == "full"


def weigh(
    cfg: RunConfig,
    model_config: Molmo2Config,
    work: Workload,
    cluster: Cluster,
    layout: Layout,
    efficiency: Efficiency | None,
) -> Candidate:
    """Memory and time of one layout."""
    numbers = number_formats(cfg)
    kept = cfg.data.feature_cache
    return Candidate(
        layout,
        memory(model_config, cfg.stage, work, layout, cfg.memory, cfg.kernels, **numbers),
        step_time(
            model_config,
            cfg.stage,
            work,
            cluster,
            layout,
            efficiency or efficiency_of(cfg, model_config)[1],
            cfg.memory,
            **numbers,
            disk_gbs=None if kept.path is None else kept.disk_gbs,
        ),
    )


def efficiency_of(cfg: RunConfig, model_config: Molmo2Config) -> tuple[str, Efficiency]:
    """The kernel that computes attention on a cluster, as far as the settings say, and the efficiency it reaches.

    `flash` counts as FlashAttention-2, which PyTorch brings along, unless `kernels.flash` names another library: what
    the cluster has installed is not known.
    """
    name: str = cfg.model.attention
    if name == "auto":
        name = automatic("cuda", "bfloat16", model_config.text.head_dim)
    libraries = {"fa3": "flash3", "fa4": "flash4", "cudnn": "cudnn"}
    implementation = libraries.get(cfg.kernels.flash, "flash2") if name == "flash" else name
    return implementation, EFFICIENCIES[SAME_EFFICIENCY.get(implementation, implementation)]


def _way(layout: Layout) -> tuple[int, int, int]:
    return layout.tensor, layout.context, layout.pipeline


def _best_of_each(ordered: list[Candidate]) -> list[Candidate]:
    """Of each way to split, fastest first: the fastest, but offload only where it gains more than `NEARLY`. It takes
    the host's memory, and the prediction is not as exact as that."""
    groups: dict[tuple[int, int, int], list[Candidate]] = {}
    for candidate in ordered:
        groups.setdefault(_way(candidate.layout), []).append(candidate)
    best = [
        min(
            (c for c in group if c.step.seconds <= NEARLY * group[0].step.seconds),
            key=lambda c: (c.layout.offload, c.step.seconds),
        )
        for group in groups.values()
    ]
    return sorted(best, key=lambda c: c.step.seconds)


def _one_of_each(ordered: list[Candidate]) -> list[Candidate]:
    first: dict[tuple[int, int, int], Candidate] = {}
    for candidate in ordered:
        first.setdefault(_way(candidate.layout), candidate)
    return list(first.values())


def _why_slower(candidate: Candidate, best: Candidate) -> str:
    slower = candidate.step.seconds / best.step.seconds - 1
    extra = {name: getattr(candidate.step, name) - getattr(best.step, name) for name in REASONS}
    worst = max(extra, key=lambda name: extra[name])
    longer = f"{slower:.0%} slower" if slower < 1 else f"takes {1 + slower:.1f} times as long"
    return longer if extra[worst] <= 0 else f"{longer}: {REASONS[worst]}"


def _why_too_big(candidate: Candidate, cluster: Cluster) -> str:
    parts = candidate.memory.parts()
    largest = max(parts, key=lambda name: parts[name])
    needs = f"needs {candidate.memory.total / GIB:,.0f} GiB of {cluster.device.memory:.0f}"
    return f"{needs}, {largest} {parts[largest] / GIB:,.0f}"


def _leaner(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Settings that a plan does not choose, in words, and the run with them: of memory each that is not in use, and
    both; whole parameters in place of FSDP, beside which no layout splits the model."""
    memory, found = cfg.memory, list[dict[str, Any]]()
    if memory.vision_chunk is None:
        found.append({"vision_chunk": 16})
    if memory.mlp_tiles == 1 and cfg.cluster.precision != "fp8":
        found.append({"mlp_tiles": 8})
    for changed in found if len(found) < 2 else [*found, found[0] | found[1]]:
        said = " ".join(f"memory.{name}={value}" for name, value in changed.items())
        yield said, replace(cfg, memory=replace(memory, **changed))
    if cfg.parallel.fsdp != "none":
        yield "parallel.fsdp=none", replace(cfg, parallel=replace(cfg.parallel, fsdp="none"))


def _what_would_fit(
    cfg: RunConfig, model_config: Molmo2Config, work: Workload, cluster: Cluster, found: list[Candidate]
) -> str:
    least = min(found, key=lambda c: c.memory.total)
    parts = least.memory.parts()
    largest = sorted(parts, key=lambda name: -parts[name])[:2]
    detail = ", ".join(f"{name} {parts[name] / GIB:,.0f}" for name in largest)
    text = (
        f"the {model_config.name} model at {work.length:,} tokens does not fit on {cluster}: the leanest layout "
        f"({least.layout.name}, recompute={least.layout.recomputed}) needs {least.memory.total / GIB:,.0f} GiB per GPU "
        f"({detail}), {cluster.device.name.upper()} has {cluster.device.memory:.0f}."
    )
    would = []
    for said, thrifty in _leaner(cfg):
        if _fitting(thrifty, model_config, work, cluster, None)[0]:
            would.append(said)
            break
    nodes, most = cluster.nodes * 2, max(64, 8 * cluster.nodes)
    while nodes <= most:
        larger = cluster.with_nodes(nodes)
        if _fitting(cfg, model_config, work, larger, None)[0]:
            would.append(f"nodes={nodes}")
            break
        nodes *= 2
    if would:
        return f"{text} {', or '.join(would)} would do."
    return (
        f"{text} No number of nodes up to {most:,} would do: take fewer tokens, GPUs with more memory, or "
        "train less of it."
    )
