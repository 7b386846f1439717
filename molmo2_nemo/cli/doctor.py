"""What is installed here, what each recipe lacks, and the command or setting that fixes it.

Exit code 0 when a run can start here (with --recipe: that recipe's), 1 when something it needs is missing."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from molmo2_nemo.cli.options import check_folder
from molmo2_nemo.errors import UserError, nearest
from molmo2_nemo.launch.probes import Finding

EXAMPLES = """\
examples:
  molmo2 doctor
  molmo2 doctor --recipe 8b --dir /lustre/me/runs
"""
MARKS = {"ok": " ", "note": "!", "missing": "x"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="check this recipe only; what it needs decides the exit code")
    parser.add_argument("--dir", type=Path, default=Path(), metavar="DIR", help="where runs go (default: here)")


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.launch import probes
    from molmo2_nemo.launch.readiness import missing_for
    from molmo2_nemo.settings.compose import group_options

    check_folder("--dir", args.dir)
    known = group_options("recipe")
    if args.recipe is not None and args.recipe not in known:
        raise UserError(f"unknown recipe {args.recipe!r}; {nearest(args.recipe, known)}")
    found: list[probes.Finding] = []
    for title, findings in (
        ("machine", probes.python()),
        ("stack", probes.stack()),
        ("needed", probes.packages()),
        ("optional", probes.optional_packages()),
        ("images and video", probes.media()),
        ("devices", probes.devices() if probes.version_of("torch") else ()),
        ("cluster", probes.slurm()),
        ("files", probes.storage(args.dir.absolute())),
        ("network", probes.network()),
    ):
        found += show(title, findings)
    missing = [f for f in found if f.level == "missing"]
    lacking = {name: missing_for(name, args.dir) for name in ([args.recipe] if args.recipe else known)}
    if missing:
        lacking = {name: ["everything marked x above", *problems] for name, problems in lacking.items()}
    show_recipes(lacking)
    for finding in missing:
        print(f"missing: {finding.name}; {finding.fix}")
    if not missing:
        print("ready: molmo2 demo")
    return 1 if missing or (args.recipe and lacking[args.recipe]) else 0


def show(title: str, findings: Iterable[Finding]) -> list[Finding]:
    """Prints a part of the report and returns its findings."""
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
