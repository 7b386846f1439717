"""Builds a kit: all that a GPU machine with torch and no network needs to run this project's GPU checks.

    python -m benchmarks.gpu.build                                for the machine of benchmarks/gpu/machine.txt
    python -m benchmarks.gpu.build --there FILE --glibc 2.28      for the one where `python -m pip inspect` printed FILE
        [--python 3.11] [--machine x86_64] [--with-video] [--leave-out NAME ...] [--limit MIB]

The kit is a folder (dist/gpu-kit) to be copied to the machine: what it lacks in the versions of requirements/cpu.txt
(planned and fetched as requirements/overlay.py does it), this project's files, shards to train on, run.sh, a manifest
with every file's checksum. Left out: what no run opens (requirements/wheels.py, UNUSED), the project's test fixtures
and results, and the video decoder, in place of which a module stands that says so when it is used.
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.gpu.manifest import MIB, NAME, Manifest
from benchmarks.gpu.manifest import read as read_manifest
from benchmarks.report import commit

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "requirements"))
import overlay  # noqa: E402
from wheels import OLDEST_GLIBC, PackageError, Wheels, build_project, pack, pack_files  # noqa: E402

LIMIT = 55  # MiB of a kit
WITH_CHECKOUT = 64  # MiB of a kit and the files of the project beside it, where both are copied together
VIDEO = "av"
NO_VIDEO = "a video decoder of 32 MiB packed; the parts of a run use shards of images. --with-video packs it"
NO_FIXTURES = "test fixtures and results, 6.7 MB that only other tests read"
PROJECT_WITHOUT = ("tests/fixtures/", "benchmarks/results/", "docs/")
BESIDE = ("torch", "numpy", "triton", "megatron-core", "transformer-engine", "flash-attn")
MACHINES = ("x86_64", "aarch64")
COPIED = ("run.sh", "unpack.py", "manifest.py")


class TooLargeError(Exception):
    """A kit is over its limit; the text names its largest parts."""


def listed(python: str, machine: str, path: Path = HERE / "machine.txt") -> overlay.Environment:
    """The machine that a list of NAME or NAME==VERSION lines describes; without a version, the pin's is taken to be
    there, so that it stays."""
    environment = overlay.elsewhere(python, machine, None)
    environment.unnamed.clear()
    pins = overlay.pins(environment)
    for line in path.read_text().splitlines():
        if text := line.split("#")[0].strip():
            name, _, version = text.partition("==")
            name = overlay.canonicalize_name(name)
            environment.installed[name] = overlay.Installed(version or pins.get(name, "==0").partition("==")[2])
    return environment


def build(args: argparse.Namespace, kit: Path) -> Manifest:
    """Lays the kit out in a new folder."""
    there = (
        overlay.elsewhere(args.python, args.machine, args.there) if args.there else listed(args.python, args.machine)
    )
    if problems := overlay.refusals(there):
        raise PackageError("\n".join(problems))
    out = dict.fromkeys(map(overlay.canonicalize_name, args.leave_out), "--leave-out")
    if missing := set(out) - set(map(overlay.canonicalize_name, overlay.pins(there))):
        raise PackageError(f"--leave-out {min(missing)}: no package of requirements/cpu.txt has this name")
    if not args.with_video:
        out.setdefault(VIDEO, NO_VIDEO)
    packages = pack_overlay(args, there, set(out), kit / "overlay.tar.xz")
    say("packing this project's files and the demo's shards")
    pack_files(project_files(), ROOT, kit / "project.tar.xz", "project")
    for name in COPIED:
        shutil.copy(HERE / name, kit)
    shutil.copy(ROOT / "docs" / "gpu.md", kit / "README.md")
    demo_shards(kit / "data")
    beside = {n: there.installed[n].version for n in BESIDE if n in there.installed}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    out = {**out, "files by rule": overlay_rule(), "of the project": NO_FIXTURES}
    manifest = Manifest(date, commit(), args.python, args.machine, args.glibc, beside, packages, out)
    manifest.write(kit)
    return manifest


def say(step: str) -> None:
    """A step of minutes that begins."""
    print(f"kit: {step}", flush=True)


def overlay_rule() -> str:
    from wheels import UNUSED

    return f"sources, stubs, byte code, commands, solvers, tests that are not imported: {UNUSED.pattern}"


def pack_overlay(args: argparse.Namespace, there: overlay.Environment, out: set[str], archive: Path) -> list[str]:
    """Packs what the machine lacks, and this package; returns the pins."""
    pins = overlay.pins(there)
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Wheels(Path(scratch) / "wheels", args.python, args.machine, args.glibc)
        say("building this package")
        project = build_project(wheels, ROOT)
        say("planning what the machine lacks, and fetching it (minutes)")
        plan = overlay.make_plan(there, pins, overlay.roots(), overlay.requirements_of(wheels, pins))
        entering = [name for name in plan.entering if name not in out]
        folder = Path(scratch) / "overlay"
        wheels.lay_out([*entering, project], folder / "site")
        if VIDEO in out and VIDEO in plan.entering:
            shutil.copytree(HERE / "stand_in" / VIDEO, folder / "site" / VIDEO)
        plan.entering[:] = entering
        overlay.write_record(folder / "site", there, plan, pins)
        overlay.write_command(folder, f"python{args.python}", args.python)
        say(f"packing {len(entering)} packages (minutes)")
        pack(folder, archive)
    return [pins[name] for name in entering]


def project_files() -> list[str]:
    """This project's files as git knows them, with their changes; less what no part of a run reads."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [name for name in found if not name.startswith(PROJECT_WITHOUT)]


def tracked_mib() -> float:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return sum((ROOT / n).stat().st_size for n in done.stdout.split("\0") if n and (ROOT / n).is_file()) / MIB


def demo_shards(folder: Path) -> None:
    """Shards of stage 1: images only."""
    from data_prep.demo import build_demo

    with tempfile.TemporaryDirectory() as scratch:
        build_demo(scratch)
        shutil.copytree(Path(scratch) / "pretrain", folder / "pretrain")


def check_size(kit: Path, manifest: Manifest, limit: float, tracked: float) -> None:
    """Raises:
    TooLargeError: the kit is over its limit, or over 64 MiB together with the project's tracked files.
    """
    together = f"with the project's {tracked:.1f} MiB over {WITH_CHECKOUT} MiB"
    why = f"over its limit of {limit:g} MiB" if manifest.mib > limit else together
    if manifest.mib <= limit and manifest.mib + tracked <= WITH_CHECKOUT:
        return
    with tarfile.open(kit / "overlay.tar.xz") as tar:
        parts = largest((member.name, member.size) for member in tar.getmembers())
    raise TooLargeError(
        f"the kit has {manifest.mib:.1f} MiB, {why}. Largest parts, unpacked: {parts}. Leave out what the run does not "
        "import (--leave-out NAME, a package's name in requirements/cpu.txt), or allow more (--limit MIB)"
    )


def largest(members: Iterable[tuple[str, int]], count: int = 6) -> str:
    """The largest folders of an overlay's site, in words."""
    sizes: Counter[str] = Counter()
    for name, size in members:
        sizes["/".join(name.split("/")[2:3])] += size
    return ", ".join(f"{name} {size / MIB:.1f}" for name, size in sizes.most_common(count))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=form)
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "gpu-kit", help="the kit's folder, made anew")
    parser.add_argument("--there", type=Path, metavar="FILE", help="what `python -m pip inspect` prints on the machine")
    parser.add_argument("--python", choices=overlay.PYTHONS, default="3.12", help="of the machine")
    parser.add_argument("--machine", choices=MACHINES, default="x86_64", help="of the machine, as uname -m says it")
    parser.add_argument("--glibc", default="2.34", help="of the machine, as ldd --version says it")
    parser.add_argument("--with-video", action="store_true", help="pack the video decoder")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="NAME", help="packages that the run can do without"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="MIB", help="most that the kit may have")
    args = parser.parse_args(argv)
    if not 0 < args.limit < math.inf:
        parser.error(f"--limit {args.limit:g}: expected MiB above 0")
    if args.there and not args.there.is_file():
        parser.error(f"--there {args.there}: no such file")
    major, _, minor = args.glibc.partition(".")
    if major != "2" or not minor.isdigit() or int(minor) < OLDEST_GLIBC:
        parser.error(f"--glibc {args.glibc}: expected a version such as 2.34, 2.{OLDEST_GLIBC} at least")
    return args


def may_replace(folder: Path) -> bool:
    """Whether nothing is there but, at most, an older kit: its manifest and files that are in it."""
    if not folder.exists() and not folder.is_symlink():
        return True
    if not folder.is_dir():
        return False
    try:
        known = {NAME, *read_manifest(folder).files}
    except ValueError:
        known = set()
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} <= known


def replace(kit: Path, args: argparse.Namespace) -> Manifest:
    """Builds a kit beside the one that is there, which goes once the new one is whole.

    Raises:
        PackageError, TooLargeError, OSError: no new kit; the old one stays.
    """
    kit.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kit.parent, prefix=".kit-") as scratch:
        made = Path(scratch) / kit.name
        made.mkdir()
        manifest = build(args, made)
        check_size(made, manifest, args.limit, tracked_mib())
        if kit.exists():
            shutil.rmtree(kit)
        made.rename(kit)
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    kit = args.out.absolute()
    if not may_replace(kit):
        print(
            f"kit: {kit} is there, and is no kit, or has files beside one (such as its results): move them, or name "
            "another folder with --out",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("kit: ended by a signal"))  # so that the half-made folder goes
    try:
        manifest = replace(kit, args)
    except KeyboardInterrupt:
        print("kit: ended by a signal", file=sys.stderr)
        return 130
    except (PackageError, TooLargeError, OSError) as error:
        print("\n".join(f"kit: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    sizes = ", ".join(f"{n} {int(e['bytes']) / MIB:.1f}" for n, e in manifest.files.items() if n.endswith(".xz"))
    print(f"kit: {kit}: {manifest.mib:.1f} MiB ({sizes}), {args.limit:g} allowed; commit {manifest.commit[:12]}")
    print("kit: copy the folder to the machine, and run there: ./run.sh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
