"""How many processes a run takes. No torch here."""

from __future__ import annotations

from molmo2_nemo.settings.run import RunConfig


def model_parallel_size(cfg: RunConfig) -> int:
    """Processes that one replica of the model takes."""
    return cfg.parallel.tensor * cfg.parallel.context * cfg.parallel.pipeline


def wanted_processes(cfg: RunConfig) -> int:
    """Processes of the run where no launcher has set their number."""
    if cfg.cluster.devices is not None:
        return cfg.cluster.nodes * cfg.cluster.devices
    return model_parallel_size(cfg) * cfg.parallel.data
