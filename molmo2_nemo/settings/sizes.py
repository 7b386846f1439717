"""How many processes a run takes. No torch here."""

from __future__ import annotations

from molmo2_nemo.settings.run import RunConfig


def wanted_processes(cfg: RunConfig) -> int:
    """Processes of the run where no launcher has set their number."""
    if cfg.cluster.devices is not None:
        return cfg.cluster.nodes * cfg.cluster.devices
    return cfg.parallel.model_size * cfg.parallel.data
