"""Every layout weighed: the best few, and for each other way to split the model why it loses."""

from __future__ import annotations

from dataclasses import dataclass, replace

from molmo2_nemo.attention.automatic import automatic
from molmo2_nemo.cost.efficiency import EFFICIENCIES, SAME_EFFICIENCY, Efficiency
from molmo2_nemo.cost.hardware import Cluster
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.step import Step, step_time
from molmo2_nemo.cost.workload import Workload
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import CANNOT_MERGE, Molmo2Config
from molmo2_nemo.plan.checks import check_cluster
from molmo2_nemo.plan.layouts import PLAIN_MODE, RECOMPUTE_MODES, layout_of, layouts, number_formats
from molmo2_nemo.plan.memory import GIB, USABLE, Memory, memory
from molmo2_nemo.settings.run import RunConfig

REASONS = {  # component of a step: why a layout loses that spends more on it
    "recompute": "recomputes activations",
    "imbalance": "one micro-batch per rank and step: ranks with costly packs are waited for",
    "bubble": "pipeline stages wait",
    "tensor": "tensor-parallel exchange",
    "context": "exchange of heads or keys",
    "gradients": "exchange of gradients",
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
    best: list[Candidate]  # that fit, fastest first, one of each way to split
    others: list[tuple[Candidate, str]]  # with the reason each loses
    modes: list[Candidate]  # the best way to split, with every mode of recomputation
    configured: Candidate | None = None  # the run's own settings, where they make sense on this cluster


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
    if not found:
        raise UserError(
            f"no layout of the {model_config.name} model divides {work.packs} packs over {cluster}; change "
            "stage.global_batch_size, or take a number of nodes that divides it"
        )
    fitting = sorted((c for c in found if c.fits(cluster)), key=lambda c: c.step.seconds)
    if not fitting:
        raise UserError(_what_would_fit(cfg, model_config, work, cluster, found))
    best = _one_of_each(fitting)
    ways = {_way(c.layout) for c in best}
    too_big = sorted((c for c in found if _way(c.layout) not in ways), key=lambda c: c.memory.total)
    others = [(c, _why_slower(c, best[0])) for c in best[keep:]]
    others += [(c, _why_too_big(c, cluster)) for c in _one_of_each(too_big)]
    modes = [
        weigh(cfg, model_config, work, cluster, replace(best[0].layout, **PLAIN_MODE | mode), efficiency)
        for mode in RECOMPUTE_MODES
    ]
    return Plan(cluster, work, best[:keep], others, modes, configured(cfg, model_config, work, cluster, efficiency))


def configured(
    cfg: RunConfig, model_config: Molmo2Config, work: Workload, cluster: Cluster, efficiency: Efficiency | None = None
) -> Candidate | None:
    """The layout that the run's settings have, replicas filling the cluster; None where they do not divide it evenly,
    or where the run has settings that plans do not cover."""
    p, m = cfg.parallel, cfg.memory
    modules = m.recompute == "selective" and m.recompute_modules != ["mlp"]
    if (
        modules
        or m.recompute_layers is not None
        or not p.distributed_optimizer
        or (m.offload and m.recompute != "full")
    ):
        return None
    replicas, left = divmod(cluster.gpus, p.model_size)
    if left or replicas == 0 or work.packs % (replicas * cfg.stage.micro_batch_size):
        return None
    return weigh(cfg, model_config, work, cluster, layout_of(cfg, replicas), efficiency)


def candidates(
    cfg: RunConfig, model_config: Molmo2Config, work: Workload, cluster: Cluster, efficiency: Efficiency | None
) -> list[Candidate]:
    return [
        weigh(cfg, model_config, work, cluster, layout, efficiency)
        for layout in layouts(model_config, cluster, work.packs, work.length, cfg.parallel.cp_comm_type)
        if cfg.model.attention not in CANNOT_MERGE or layout.ulysses == layout.context
    ]


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
    needs = f"needs {candidate.memory.total / GIB:.0f} GiB of {cluster.device.memory:.0f}"
    return f"{needs}, {largest} {parts[largest] / GIB:.0f}"


def _what_would_fit(
    cfg: RunConfig, model_config: Molmo2Config, work: Workload, cluster: Cluster, found: list[Candidate]
) -> str:
    least = min(found, key=lambda c: c.memory.total)
    parts = least.memory.parts()
    largest = sorted(parts, key=lambda name: -parts[name])[:2]
    detail = ", ".join(f"{name} {parts[name] / GIB:.0f}" for name in largest)
    text = (
        f"the {model_config.name} model at {work.length:,} tokens does not fit on {cluster}: the leanest layout "
        f"({least.layout.name}, recompute={least.layout.recomputed}) needs {least.memory.total / GIB:.0f} GiB per GPU "
        f"({detail}), {cluster.device.name.upper()} has {cluster.device.memory:.0f}."
    )
    nodes = cluster.nodes * 2
    while nodes <= 64:
        larger = cluster.with_nodes(nodes)
        if any(c.fits(larger) for c in candidates(cfg, model_config, work, larger, None)):
            return f"{text} nodes={nodes} would do."
        nodes *= 2
    return (
        f"{text} No number of nodes up to 64 would do: take fewer tokens, GPUs with more memory, or train less of it."
    )
