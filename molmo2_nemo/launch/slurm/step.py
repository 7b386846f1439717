"""Processes that srun started: how they are recognised, and what they need to find one another."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any


def in_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process. The shells of sbatch and salloc have step numbers above all real ones."""
    step = env.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < 0xFFFFFFF0


def adopt_slurm(env: Any) -> None:
    """Gives a process that srun started the variables torch expects, unless a launcher has set them.

    Args:
        env: the environment; changed in place.
    """
    if not in_step(env) or "SLURM_PROCID" not in env or "RANK" in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env.get("SLURM_NTASKS", "1")
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env["LOCAL_WORLD_SIZE"] = str(int(env["WORLD_SIZE"]) // int(env.get("SLURM_NNODES", "1")))
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        env["MASTER_ADDR"] = listed.stdout.split()[0] if listed.stdout.split() else "localhost"
    # Every process of a job computes the same port; other jobs of the node compute others.
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
