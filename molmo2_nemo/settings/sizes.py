"""How many processes a run takes, and the name of its layout. No torch here."""

from __future__ import annotations

from molmo2_nemo.settings.run import RunConfig


def model_parallel_size(cfg: RunConfig) -> int:
    """Processes that one replica of the model takes."""
    return cfg.parallel.tensor * cfg.parallel.context * cfg.parallel.pipeline


def wanted_processes(cfg: RunConfig) -> int:
    """Processes of the run when nothing outside says how many there are."""
    if cfg.cluster.devices is not None:
        return cfg.cluster.nodes * cfg.cluster.devices
    return model_parallel_size(cfg) * cfg.parallel.data


def layout_name(cfg: RunConfig, processes: int) -> str:
    """A layout in a few letters, such as "TP2+SP" or "DP2"; "1 process" when nothing is split.

    Args:
        processes: of the run; what one replica does not take is data parallel.
    """
    parallel = cfg.parallel
    sizes = (("TP", parallel.tensor), ("CP", parallel.context), ("PP", parallel.pipeline))
    parts = [f"{name}{size}" for name, size in sizes if size > 1]
    if parallel.sequence:
        parts.insert(1, "SP")
    replicas = processes // model_parallel_size(cfg)
    if replicas > 1:
        parts.append(f"DP{replicas}")
    return "+".join(parts) or "1 process"
