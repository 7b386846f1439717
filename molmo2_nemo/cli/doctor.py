"""What is here, what is missing for which recipe, and the line that brings it.

Exit code 0 when a run can start here (with --recipe: that recipe's), 1 when something it needs is missing."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from molmo2_nemo.cli.options import check_folder
from molmo2_nemo.errors import UserError, nearest
from molmo2_nemo.launch.probes import Finding
from molmo2_nemo.settings.run import RunConfig

EXAMPLES = """\
examples:
  molmo2 doctor
  molmo2 doctor --recipe 8b --dir /lustre/me/runs
"""
NAMED = 5  # data sets without shards that are named, where there are no more of them
MARKS = {"ok": " ", "note": "!", "missing": "x"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="ask about this recipe only; its needs decide the exit code")
    parser.add_argument("--dir", type=Path, default=Path(), metavar="DIR", help="where runs go (default: here)")


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.launch import probes

    check_folder("--dir", args.dir)
    known = recipe_names()
    if args.recipe is not None and args.recipe not in known:
        raise UserError(f"unknown recipe {args.recipe!r}; {nearest(args.recipe, known)}")
    found: list[probes.Finding] = []
    for title, findings in (
        ("machine", probes.python()),
        ("needed", probes.packages()),
        ("optional", probes.optional_packages()),
        ("pictures and video", probes.media()),
        ("devices", probes.devices() if probes.version_of("torch") else ()),
        ("cluster", probes.slurm()),
        ("files", probes.storage(args.dir.absolute())),
        ("network", probes.network()),
    ):
        found += show(title, findings)
    missing = [f for f in found if f.level == "missing"]
    lacking = {name: missing_for(name, args.dir) for name in ([args.recipe] if args.recipe else known)}
    if missing:
        lacking = {name: ["what is marked x above", *problems] for name, problems in lacking.items()}
    show_recipes(lacking)
    for finding in missing:
        print(f"missing: {finding.name}; {finding.fix}")
    if not missing:
        print("ready: molmo2 demo")
    return 1 if missing or (args.recipe and lacking[args.recipe]) else 0


def show(title: str, findings: Iterable[Finding]) -> list[Finding]:
    """Prints a part of the report and returns what it says."""
    found = list(findings)
    if found:
        print(title)
    for f in found:
        print(f"  {MARKS[f.level]} {f.name:<18} {f.seen}".rstrip())
        if f.fix:
            print(f"      {f.fix}")
    return found


def show_recipes(lacking: dict[str, list[str]]) -> None:
    """Prints each problem once, with the recipes that have it."""
    print("recipes")
    ready = [name for name, problems in lacking.items() if not problems]
    if ready:
        print(f"    {'ready':<18} {', '.join(ready)}")
    for problem in dict.fromkeys(p for problems in lacking.values() for p in problems):
        print(f"  {MARKS['note']} {', '.join(name for name, problems in lacking.items() if problem in problems)}")
        print(f"      {problem}")


def recipe_names() -> list[str]:
    from molmo2_nemo.settings.compose import group_choices

    return group_choices("recipe")


def missing_for(name: str, folder: Path) -> list[str]:
    """What this recipe would lack here in any of its stages, one line each with the way to get it; empty when it could
    start.

    Args:
        folder: where its runs would go.
    """
    from molmo2_nemo.settings.compose import STAGES, compose

    try:
        stages = [compose([f"recipe={name}", f"stage={stage}"]) for stage in STAGES]
    except ImportError as error:
        return [f"{error}; pip install --no-deps -r requirements/cpu.txt"]
    found = [line for cfg in stages for line in (*_devices(cfg), *_tokenizer(cfg), *_disk(cfg, folder))]
    return list(dict.fromkeys([*found, *_sources(stages)]))


def _devices(cfg: RunConfig) -> Iterator[str]:
    from molmo2_nemo.settings.checks import wanted_processes

    if cfg.cluster.kind == "slurm":
        ssh = cfg.cluster.slurm.ssh.host
        if shutil.which("sbatch") is None and ssh is None and "SLURM_JOB_ID" not in os.environ:
            yield "no Slurm here: call molmo2 on a login node, or set cluster.slurm.ssh.host, or take cluster=gpu"
        return
    if cfg.cluster.precision != "bf16":
        return
    try:
        import torch

        here = torch.cuda.device_count()
    except Exception:  # reported above
        return
    wanted = wanted_processes(cfg) // cfg.cluster.nodes
    if here < wanted:
        yield f"{wanted} GPUs are wanted, {here} are here; molmo2 plan shows layouts for fewer"


def _tokenizer(cfg: RunConfig) -> Iterator[str]:
    tokenizer = cfg.data.tokenizer
    if tokenizer != "tiny" and not (Path(tokenizer) / "tokenizer.json").is_file():
        yield f"no tokenizer in {tokenizer}/: export MOLMO2_TOKENIZER=<folder of the base model's tokenizer.json>"


def _sources(stages: Sequence[RunConfig]) -> Iterator[str]:
    """Data sets of all stages: some are in one only."""
    from molmo2_nemo.data.sampling import is_missing

    wanted = {
        (key, source.path): source for cfg in stages for key, source in cfg.data.sources.items() if source.rate > 0
    }
    if {key for key, _ in wanted} == {"demo"}:
        return  # molmo2 demo makes them
    gone = [key for (key, _), source in wanted.items() if is_missing(source)]
    if gone:
        named = f" ({', '.join(gone)})" if len(gone) <= NAMED else ""
        how = "molmo2 prepare makes shards, molmo2 mixture shows which are missing, data.missing=skip leaves sets out"
        yield f"{len(gone)} of {len(wanted)} data sets have no shards{named}: {how}"
    elif not wanted:
        yield "no data sets: data.sources.mine.path=<folder of shards>"


def _disk(cfg: RunConfig, folder: Path) -> Iterator[str]:
    """Two checkpoints must fit: a new one is written before the old one goes."""
    from molmo2_nemo.cost.parameters import parameters
    from molmo2_nemo.model.config import preset

    count = parameters(preset(cfg.model.preset)).total
    needed = 2 * count * 16 / 2**30  # weights and, in fp32, master weights and two moments: 14 to 16 bytes
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    if free < needed:
        yield f"two checkpoints take {needed:.0f} GiB, {free:.0f} are free: output_dir=... on a larger file system"
