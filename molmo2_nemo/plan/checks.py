"""Settings that no plan can be made of, refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.checks import check
from molmo2_nemo.settings.run import ParallelConfig, RunConfig


def check_settings(cfg: RunConfig, overrides: Sequence[str]) -> None:
    """Refuses settings that no run could have. Of the layout only what the user has set is checked: the recipe's own
    need not fit this cluster.

    Raises:
        UserError: lists them.
    """
    for item in overrides:
        if item.lstrip("+~").startswith(("cluster.nodes", "cluster.devices")):
            raise UserError(f"{item}: a plan's hardware is set with cluster=h100x8 nodes=N")
        if item.lstrip("+~").startswith("cluster.precision") and cfg.cluster.precision == "fp32":
            raise UserError(f"{item}: plans are of runs in bf16 or fp8")
    mine = any(item.lstrip("+~").startswith("parallel") for item in overrides)
    parallel = cfg.parallel if mine else ParallelConfig()
    stage = replace(cfg.stage, micro_batch_size=min(1, cfg.stage.micro_batch_size))  # the plan chooses it
    planned = replace(cfg, parallel=parallel, stage=stage)
    check(planned, processes=max(1, planned.parallel.model_size), files=False)
