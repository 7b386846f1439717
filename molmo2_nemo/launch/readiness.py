"""What a recipe would lack on this machine: devices, tokenizer, shards, disk. Torch only where it is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from molmo2_nemo.settings.run import RunConfig

NAMED = 5  # at most this many data sets without shards are listed by name


def missing_for(name: str, folder: Path) -> list[str]:
    """What this recipe would lack here in any of its stages, one line each with the way to get it; empty when it could
    start.

    Args:
        folder: where its runs would go.
    """
    from molmo2_nemo.settings.compose import compose, stages_of

    try:
        stages = [compose([f"recipe={name}", f"stage={stage}"]) for stage in stages_of([f"recipe={name}"])]
    except ImportError as error:
        return [f"{error}; pip install --no-deps -r requirements/cpu.txt"]
    found = [line for cfg in stages for line in (*_devices(cfg), *_tokenizer(cfg), *_disk(cfg, folder))]
    return list(dict.fromkeys([*found, *_sources(stages)]))


def _devices(cfg: RunConfig) -> Iterator[str]:
    from molmo2_nemo.settings.sizes import wanted_processes

    if cfg.cluster.kind == "slurm":
        ssh = cfg.cluster.slurm.ssh.host
        if shutil.which("sbatch") is None and ssh is None and "SLURM_JOB_ID" not in os.environ:
            yield "no Slurm here: run molmo2 on a login node, set cluster.slurm.ssh.host, or use cluster=gpu"
        return
    if cfg.cluster.precision == "fp32":
        return
    try:
        import torch

        here = torch.cuda.device_count()
    except Exception:  # reported above
        return
    wanted = wanted_processes(cfg) // cfg.cluster.nodes
    if here < wanted:
        yield f"{wanted} GPUs are needed on a node, {here} are here; molmo2 plan shows layouts for fewer"


def _tokenizer(cfg: RunConfig) -> Iterator[str]:
    from molmo2_nemo.data.tokenizer import Molmo2Tokenizer

    tokenizer = cfg.data.tokenizer
    if not Molmo2Tokenizer.exists(tokenizer):
        yield f"no tokenizer in {tokenizer}/: export MOLMO2_TOKENIZER=<folder of the base model's tokenizer.json>"


def _sources(stages: Sequence[RunConfig]) -> Iterator[str]:
    """Data sets of all stages: some are in one only."""
    from molmo2_nemo.data.objects.files import use
    from molmo2_nemo.data.sampling import is_missing

    wanted = {
        (key, source.path): source for cfg in stages for key, source in cfg.data.sources.items() if source.rate > 0
    }
    if {key for key, _ in wanted} == {"demo"}:
        return  # molmo2 demo makes them
    for cfg in stages:
        use(cfg.data.store)
    gone = [key for (key, _), source in wanted.items() if is_missing(source)]
    if gone:
        named = f" ({', '.join(gone)})" if len(gone) <= NAMED else ""
        how = "molmo2 prepare makes shards, molmo2 mixture shows which are missing, data.missing=skip leaves sets out"
        yield f"{len(gone)} of {len(wanted)} data sets have no shards{named}: {how}"
    elif not wanted:
        yield "no data sets: data.sources.mine.path=<folder of shards>"


def _disk(cfg: RunConfig, folder: Path) -> Iterator[str]:
    """Two checkpoints must fit: a new one is written before the old one goes."""
    from molmo2_nemo.launch.disk import checkpoint_bytes, free_bytes

    needed, free = 2 * checkpoint_bytes(cfg) / 2**30, free_bytes(folder) / 2**30
    if free < needed:
        yield f"two checkpoints take {needed:.0f} GiB, {free:.0f} are free: set output_dir=... on a larger file system"
