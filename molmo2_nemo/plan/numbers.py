"""A plan as plain values, for `molmo2 plan --json`."""

from __future__ import annotations

from typing import Any

from molmo2_nemo.cost.parameters import parameters
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.plan.memory import GIB
from molmo2_nemo.plan.search import Candidate, Plan


def numbers(plan: Plan, model_config: Molmo2Config) -> dict[str, Any]:
    """The plan as JSON values: seconds, GiB, GPU-hours, operations."""

    def one(candidate: Candidate) -> dict[str, Any]:
        step = candidate.step
        return {
            "layout": candidate.layout.name,
            "settings": candidate.layout.settings,
            "fits": candidate.fits(plan.cluster),
            "fullest_moment": candidate.memory.phase,
            "memory_gib": {name: value / GIB for name, value in candidate.memory.parts().items()},
            "host_gib": candidate.memory.host / GIB,
            "host_optimizer_gib": candidate.memory.host_optimizer / GIB,
            "step_seconds": step.parts(),
            "seconds": step.seconds,
            "mfu": step.mfu(plan.cluster),
            "gpu_hours": step.gpu_hours(plan.cluster, plan.work.steps),
            "link_bytes": step.link_bytes,
            "network_bytes": step.network_bytes,
            "disk_bytes": step.disk_bytes,
        }

    flops = plan.best[0].step.flops  # the same under every layout
    return {
        "cluster": str(plan.cluster),
        "parameters": parameters(model_config).total,
        "steps": plan.work.steps,
        "workload": vars(plan.work),
        "flops_per_step": vars(flops) | {"total": flops.total},
        "best": [one(c) for c in plan.best],
        "first_epoch": one(plan.first_epoch) if plan.first_epoch else None,
        "configured": one(plan.configured) if plan.configured else None,
        "not_configured": plan.unplaced,
        "by_recompute": [one(c) for c in plan.modes],
        "others": [one(c) | {"why_not": why} for c, why in plan.others],
    }
