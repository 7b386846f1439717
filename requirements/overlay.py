"""Puts NeMo 2.7, what that needs and this package beside an environment that has torch, such as an NGC NeMo image.

    python requirements/overlay.py FOLDER             for the environment of this python
    python requirements/overlay.py FOLDER --dry-run   only says what it would do
    python requirements/overlay.py --archive FILE     for a machine without a network, packed here where there is one;
        [--python 3.12] [--machine x86_64] [--glibc 2.34] [--there FILE]    FILE: what `python -m pip inspect` prints

FOLDER gets bin/molmo2, which starts the command with FOLDER/site before the environment's own packages. Nothing else
looks into it: torch, Megatron-core, Transformer Engine, flash-attn, numpy and triton stay the environment's, and
everything is as it was for other programs. Where NeMo 2.7 and a fitting transformers are installed and nothing has to
be replaced, what is missing goes into the environment instead, with bin/molmo2 as a link to its command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
try:
    from wheels import OLDEST_GLIBC, PackageError, Requirement, Wheels, build_project, canonicalize_name, pack
except ImportError as error:
    sys.exit(f"overlay: {sys.executable}: {error}; it is needed to compare versions: pip install packaging")
if "pip._vendor" in Requirement.__module__:
    from pip._vendor.packaging.markers import default_environment
    from pip._vendor.packaging.specifiers import SpecifierSet
    from pip._vendor.packaging.version import InvalidVersion, Version
else:
    from packaging.markers import default_environment
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

from molmo2_nemo.compat import TRIED  # noqa: E402
from molmo2_nemo.launch.overlay import RECORD  # noqa: E402

PYTHONS = ("3.11", "3.12")  # those that there are pins for
# The environment's own, compiled for each other: never replaced, with the module that shows that one is there.
KEPT = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine",
    "flash-attn": "flash_attn",
    "numpy": "numpy",
    "triton": "triton",
}
# What must be as it is for other programs, beside those.
WATCHED = (*KEPT.values(), "transformers", "huggingface_hub", "tokenizers", "lightning", "nemo")
EXTRAS = {"nemo-toolkit": "llm"}  # of what a package asks for, this part is used too
OPTIONAL = ("braceexpand", "intervaltree", "matplotlib", "tensorboard")  # of webdataset and lhotse; of the demo
IMAGES = "NVIDIA's NeMo images from 26.02 on"

WRAPPER = """\
#!/bin/sh
# molmo2, with the packages of ../site before those of the environment. Other programs do not see them.
here=$(dirname "$(dirname "$(readlink -f "$0")")")
python=${MOLMO2_PYTHON:-@EXECUTABLE@}
seen=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit 2
if [ "$seen" != @PYTHON@ ]; then
    echo "molmo2: the packages in $here/site are for Python @PYTHON@, $python is $seen; set MOLMO2_PYTHON" >&2
    exit 2
fi
export PYTHONPATH="$here/site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m molmo2_nemo.cli.main "$@"
"""


@dataclass
class Installed:
    version: str
    requires: list[str] = field(default_factory=list)


@dataclass
class Environment:
    """What the overlay goes beside."""

    python: str  # such as 3.12
    installed: dict[str, Installed]  # by canonical name
    markers: dict[str, str]  # values of environment markers
    unnamed: list[str] = field(default_factory=list)  # modules of KEPT that no installed package owns up to


@dataclass
class Plan:
    entering: list[str]  # canonical names of pins, without this project
    shadowed: list[str]  # those of them that the environment has in another version
    mode: str  # overlay, or add: into the environment itself
    notes: list[str]


def here() -> Environment:
    installed: dict[str, Installed] = {}
    for found in distributions():
        if found.metadata["Name"]:
            name = canonicalize_name(found.metadata["Name"])
            installed.setdefault(name, Installed(found.version, list(found.requires or [])))
    unnamed = [name for name, module in KEPT.items() if name not in installed and _is_there(module)]
    for name in (name for name in unnamed if name in TRIED):
        raise PackageError(
            f"{KEPT[name]} can be imported, but no installed package says which version it is: install the folder that "
            "it comes from (python -m pip install --no-deps --no-build-isolation -e FOLDER)"
        )
    python = ".".join(platform.python_version_tuple()[:2])
    return Environment(python, installed, {**default_environment(), "extra": ""}, unnamed)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def elsewhere(python: str, machine: str, inspected: Path | None) -> Environment:
    """Another machine's, from what `pip inspect` printed there; without that, one of torch, numpy and triton alone."""
    markers = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    markers |= {"platform_machine": machine, "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    if inspected is None:
        return Environment(python, {}, {**markers, "extra": ""}, ["torch", "numpy", "triton"])
    try:
        said = json.loads(inspected.read_text(encoding="utf-8"))
        installed = dict(_installed(entry["metadata"]) for entry in said["installed"])
        theirs = {name: _text(value, name) for name, value in said["environment"].items()}
        there, system, kind = (theirs[n] for n in ("python_version", "sys_platform", "platform_machine"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(f"{inspected} is not what `python -m pip inspect` prints: {error!r}") from error
    if there != python:
        raise PackageError(f"{inspected} was made by Python {there}, but --python is {python}: give --python {there}")
    if system != "linux":
        raise PackageError(f"{inspected} was made on {system}: an overlay is for Linux")
    if kind != machine:
        raise PackageError(f"{inspected} was made on {kind}, but --machine is {machine}: give --machine {kind}")
    return Environment(there, installed, {**markers, **theirs, "extra": ""})


def _installed(metadata: dict[str, Any]) -> tuple[str, Installed]:
    """A package as `pip inspect` describes it. Raises KeyError or TypeError for anything else."""
    name = _text(metadata["name"], "name")
    requires = metadata.get("requires_dist") or []
    if not isinstance(requires, list):
        raise TypeError(f"requires_dist of {name} is {requires!r}, expected a list")
    version = _text(metadata["version"], f"version of {name}")
    return canonicalize_name(name), Installed(version, [_text(line, f"requires_dist of {name}") for line in requires])


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} is {value!r}, expected a text")
    return value


def pins(environment: Environment) -> dict[str, str]:
    """NAME==VERSION for this Python by canonical name, from cpu.txt."""
    found = {}
    for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines():
        if text := line.split("#")[0].strip():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(environment.markers):
                found[canonicalize_name(requirement.name)] = f"{requirement.name}{requirement.specifier}"
    return found


def roots() -> list[Requirement]:
    """What this package imports: its dependencies and the trainer, with the versions that it takes."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {}
    for line in (*project["dependencies"], *project["optional-dependencies"]["stack"], *OPTIONAL):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in TRIED:
            requirement = Requirement(f"{requirement.name}{TRIED[name].accepted}")
        found.setdefault(name, requirement)
    return list(found.values())


def refusals(environment: Environment) -> list[str]:
    """Why nothing can be put beside this environment, with what is there and what is needed."""
    found = []
    if environment.python not in PYTHONS:
        found.append(f"Python {environment.python} is here, {' or '.join(PYTHONS)} is needed: {IMAGES} have 3.12")
    for name in (name for name in TRIED if name in KEPT and name not in environment.unnamed):
        installed, wanted = environment.installed.get(name), TRIED[name].accepted
        if installed is None and name == "torch":
            found.append(f"no torch is here, torch{wanted} is needed: take an NGC NeMo image, or install torch first")
        elif installed is not None and not fits(installed.version, SpecifierSet(wanted)):
            found.append(f"{name} {installed.version} is here, {wanted} is needed: {IMAGES} have it")
    return found


def fits(version: str, wanted: SpecifierSet) -> bool:
    """Whether a version is among those wanted; local parts ("+cu130", "+nv25.1") do not count."""
    try:
        return wanted.contains(Version(version).public, prereleases=True)
    except InvalidVersion:
        return False


def make_plan(
    environment: Environment,
    pins: dict[str, str],
    roots: Iterable[Requirement],
    requires: Callable[[set[str]], dict[str, list[Requirement]]],
) -> Plan:
    """What must come beside the environment so that what this package imports is there, in versions that go together.

    A pin enters when what is wanted is absent, when the environment's version is not what this package or something
    that enters asks for, or when the environment's own asks for another version of something that enters. With NeMo
    come all pins that are absent: it imports much that its metadata does not name.

    Args:
        requires: what the pinned versions of packages ask for, by name.
    """
    demands: list[tuple[str, Requirement]] = [("molmo2_nemo", r) for r in roots]
    entering: set[str] = set()
    wanted = {canonicalize_name(r.name) for _, r in demands}
    while fresh := _missing(environment, pins, wanted, demands, entering):
        if "nemo-toolkit" in fresh:
            wanted |= set(pins)
        for name, asked in requires(fresh).items():
            used = _pinned(asked, pins, {**environment.markers, "extra": EXTRAS.get(name, "")})
            demands += [(name, r) for r in used]
            wanted |= {canonicalize_name(r.name) for r in used}
        entering |= fresh
    shadowed = sorted(name for name in entering if name in environment.installed)
    add = not shadowed and not entering & {"nemo-toolkit", "transformers"}
    notes = [*_left(environment, demands), *_strained(environment, pins, entering)]
    return Plan(sorted(entering), shadowed, "add" if add else "overlay", notes)


def _pinned(asked: list[Requirement], pins: dict[str, str], markers: dict[str, str]) -> list[Requirement]:
    """Those requirements that hold here and that the pins meet: the others were found not to matter."""
    found = []
    for requirement in asked:
        pin = pins.get(canonicalize_name(requirement.name))
        if pin and (requirement.marker is None or requirement.marker.evaluate(markers)):
            if fits(pin.partition("==")[2], requirement.specifier):
                found.append(requirement)
    return found


def _missing(
    environment: Environment,
    pins: dict[str, str],
    wanted: set[str],
    demands: list[tuple[str, Requirement]],
    entering: set[str],
) -> set[str]:
    """Pins that are wanted and must enter, beside those that do."""
    found = set()
    for name in (wanted & set(pins)) - entering - set(environment.unnamed):
        installed = environment.installed.get(name)
        if installed is None:
            found.add(name)
        elif name not in KEPT:
            asked = [r for _, r in demands if canonicalize_name(r.name) == name]
            if not all(fits(installed.version, r.specifier) for r in asked) or _unmet(
                environment, pins, entering, name
            ):
                found.add(name)
    return found


def _unmet(environment: Environment, pins: dict[str, str], entering: set[str], name: str) -> list[str]:
    """What the environment's package asks for and would get in another version."""
    found = []
    for line in environment.installed[name].requires:
        try:
            asked = Requirement(line)
        except ValueError:  # older than the rules; says nothing that could be compared
            continue
        other = canonicalize_name(asked.name)
        if other in entering and (asked.marker is None or asked.marker.evaluate(environment.markers)):
            if not fits(pins[other].partition("==")[2], asked.specifier):
                found.append(f"{asked.name}{asked.specifier}")
    return found


def _left(environment: Environment, demands: list[tuple[str, Requirement]]) -> list[str]:
    """The environment's own that stay although something asks for another version."""
    return [
        f"{name} {installed.version} stays, though {by} asks for {asked.specifier}"
        for name, installed in environment.installed.items()
        if name in KEPT
        for by, asked in demands
        if canonicalize_name(asked.name) == name and not fits(installed.version, asked.specifier)
    ]


def _strained(environment: Environment, pins: dict[str, str], entering: set[str]) -> list[str]:
    """The environment's own that ask for another version of something than `molmo2` will see."""
    found = []
    for name in sorted(set(environment.installed) - entering):
        if unmet := _unmet(environment, pins, entering, name):
            found.append(f"within molmo2, {name} of the environment does not find {', '.join(unmet)}")
    return found


def write_command(folder: Path, executable: str, python: str) -> None:
    path = folder / "bin" / "molmo2"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(WRAPPER.replace("@EXECUTABLE@", executable).replace("@PYTHON@", python))
    path.chmod(0o755)


def write_record(site: Path, environment: Environment, plan: Plan, pins: dict[str, str]) -> None:
    """What the folder is and what it was made beside; `molmo2 doctor` reads it."""
    beside = {n: environment.installed[n].version for n in KEPT if n in environment.installed}
    record = {"python": environment.python, "beside": beside, "packages": [pins[n] for n in plan.entering]}
    (site / RECORD).write_text(json.dumps(record, indent=1) + "\n")


SNAPSHOT = """
import importlib.metadata as m, importlib.util as u, json
def origin(name):
    try:
        spec = u.find_spec(name)
    except (ImportError, ValueError):
        return None
    return spec and (spec.origin or str(list(spec.submodule_search_locations or [])))
names = {}
for d in m.distributions():
    names.setdefault(str(d.metadata["Name"]).lower().replace("_", "-"), d.version)
print(json.dumps({"packages": names, "modules": {n: origin(n) for n in %r}}))
"""


def snapshot(pythonpath: Path | None = None) -> dict[str, dict[str, Any]]:
    """What a python without (or with) the overlay finds: versions of packages, places of modules."""
    env = dict(os.environ)
    if pythonpath is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(pythonpath), env.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT % (WATCHED,)], env=env, cwd="/", text=True, capture_output=True
    )
    if done.returncode:
        raise PackageError(f"{sys.executable} cannot list its packages: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check(before: dict[str, Any], after: dict[str, Any], inside: dict[str, Any] | None) -> list[str]:
    """What is not as it was, or not as it must be within `molmo2` (inside: None where all went to the environment)."""
    changed = [
        f"{name} was {version}, now {after['packages'].get(name, 'gone')}"
        for name, version in before["packages"].items()
        if after["packages"].get(name) != version
    ]
    if inside is None:
        return changed
    changed += [f"{name} has come into the environment" for name in after["packages"] if name not in before["packages"]]
    for name, place in before["modules"].items():
        if after["modules"][name] != place:
            changed.append(f"import {name} was {place}, now {after['modules'][name]}")
    for name in KEPT.values():
        if before["modules"][name] and inside["modules"][name] != before["modules"][name]:
            changed.append(f"within molmo2, {name} is {inside['modules'][name]}, not {before['modules'][name]}")
    return changed


def requirements_of(wheels: Wheels, pins: dict[str, str]) -> Callable[[set[str]], dict[str, list[Requirement]]]:
    def fetch(names: set[str]) -> dict[str, list[Requirement]]:
        wheels.fetch([pins[name] for name in sorted(names)])
        return {name: wheels.requires(name) for name in sorted(names)}

    return fetch


def show(environment: Environment, plan: Plan, pins: dict[str, str]) -> None:
    stays = [f"{n} {environment.installed[n].version}" for n in KEPT if n in environment.installed]
    print(f"overlay: Python {environment.python}; stays: {', '.join([*stays, *environment.unnamed])}")
    where = "a folder of its own" if plan.mode == "overlay" else "the environment, which lacks only this"
    print(f"overlay: into {where}: {', '.join([*(pins[n] for n in plan.entering), 'molmo2_nemo'])}")
    if plan.shadowed:
        replaced = [f"{n} {environment.installed[n].version} -> {pins[n].partition('==')[2]}" for n in plan.shadowed]
        print(f"overlay: for molmo2 only: {', '.join(replaced)}")
    for note in plan.notes:
        print(f"overlay: note: {note}")


def check_folder(folder: Path) -> None:
    """Whether an overlay can be laid out there, before anything is fetched."""
    if (folder / "bin").resolve() == Path(sysconfig.get_path("scripts")).resolve():
        raise PackageError(f"{folder}/bin has the environment's own commands: choose another folder")
    for made in (folder / "site", folder / "bin" / "molmo2"):
        if os.path.lexists(made):
            raise PackageError(f"{made} is there already: remove it, or choose another folder")
    present = next(p for p in (folder / "bin", folder, *folder.parents) if os.path.lexists(p))
    _check_writable(present)


def check_archive(archive: Path) -> None:
    """Whether an overlay can be packed there, before anything is fetched."""
    if not archive.name.endswith((".tar.gz", ".tar.xz")):
        raise PackageError(f"--archive {archive}: name it .tar.gz, or .tar.xz for a smaller one that takes longer")
    if archive.is_dir():
        raise PackageError(f"--archive {archive} is a folder: name a file")
    if not os.path.lexists(archive.parent):
        raise PackageError(f"--archive {archive}: there is no folder {archive.parent}")
    _check_writable(archive.parent)


def _check_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise PackageError(f"{folder} is not a folder: choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PackageError(f"{folder} cannot be written to: choose another place, or change its permissions")


def make_here(folder: Path, environment: Environment, dry: bool) -> None:
    """An overlay for the environment that runs this."""
    known = pins(environment)
    before = snapshot()
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Wheels(Path(scratch))
        project = build_project(wheels, ROOT)
        plan = make_plan(environment, known, roots(), requirements_of(wheels, known))
        show(environment, plan, known)
        if plan.mode == "add" and project in environment.installed:
            raise PackageError(f"{project} is installed here already, and NeMo beside it: there is nothing to make")
        if dry:
            return
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        if plan.mode == "add":
            wheels.install([*plan.entering, project])
            (folder / "bin" / "molmo2").symlink_to(Path(sysconfig.get_path("scripts")) / "molmo2")
            changed = check(before, snapshot(), None)
        else:
            wheels.lay_out([*plan.entering, project], folder / "site")
            write_record(folder / "site", environment, plan, known)
            write_command(folder, sys.executable, environment.python)
            changed = check(before, snapshot(), snapshot(folder / "site"))
    if changed:
        raise PackageError("the environment is not as it was:\n  " + "\n  ".join(changed))
    print(f"overlay: {folder}/bin/molmo2; the environment is as it was for everything else")


def make_archive(archive: Path, environment: Environment, machine: str, glibc: str, dry: bool) -> None:
    """An overlay for another machine, packed."""
    known = pins(environment)
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Wheels(Path(scratch) / "wheels", environment.python, machine, glibc)
        project = build_project(wheels, ROOT)
        plan = make_plan(environment, known, roots(), requirements_of(wheels, known))
        show(environment, plan, known)
        if dry:
            return
        folder = Path(scratch) / "overlay"
        wheels.lay_out([*plan.entering, project], folder / "site")
        write_record(folder / "site", environment, plan, known)
        write_command(folder, f"python{environment.python}", environment.python)
        count, size = pack(folder, archive)
    packed = archive.stat().st_size
    print(f"overlay: {archive}: {count} files, {size / 2**20:.0f} MiB, packed {packed / 2**20:.0f} MiB")
    print(f"overlay: there: tar -xf {archive.name} && molmo2-overlay/bin/molmo2 doctor")


def main(argv: list[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=form)
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="FOLDER", help="where the overlay of this environment goes"
    )
    parser.add_argument("--archive", type=Path, metavar="FILE", help="pack an overlay for another machine instead")
    parser.add_argument("--python", choices=PYTHONS, help="of the other machine (default: 3.12)")
    parser.add_argument("--machine", help="of the other machine, as uname -m says it (default: x86_64)")
    parser.add_argument("--glibc", help="of the other machine, as ldd --version says it (default: 2.34)")
    parser.add_argument(
        "--there", type=Path, metavar="FILE", help="what `python -m pip inspect` prints on the other machine"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--pins", choices=PYTHONS, help="print the pins for this Python and end")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    python, machine, glibc = args.python or "3.12", args.machine or "x86_64", args.glibc or "2.34"
    try:
        if args.pins:
            print("\n".join(pins(elsewhere(args.pins, machine, None)).values()))
            return 0
        if args.folder:
            check_folder(args.folder.absolute())
        else:
            check_archive(args.archive.absolute())
        environment = here() if args.folder else elsewhere(python, machine, args.there)
        if problems := refusals(environment):
            raise PackageError("\n".join(problems))
        if args.folder:
            make_here(args.folder.absolute(), environment, args.dry_run)
        else:
            make_archive(args.archive.absolute(), environment, machine, glibc, args.dry_run)
    except (PackageError, OSError) as error:
        print("\n".join(f"overlay: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Those that do not go together, and a C library that no wheel is for, end the program here."""
    given = [f"--{n.replace('_', '-')}" for n in ("python", "machine", "glibc", "there", "dry_run") if getattr(args, n)]
    if args.pins:
        others = [n for n in given if n != "--machine"] + [n for n in ("folder", "archive") if getattr(args, n)]
        if others:
            parser.error(f"--pins only prints them: leave out {', '.join(others)}")
    elif (args.folder is None) == (args.archive is None):
        parser.error("give FOLDER or --archive FILE")
    elif args.folder and (others := [n for n in given if n != "--dry-run"]):
        parser.error(
            f"{', '.join(others)}: for another machine; give --archive FILE instead of FOLDER, or leave it out"
        )
    if args.glibc is not None:
        version = re.fullmatch(r"2\.([0-9]{1,2})", args.glibc)
        if version is None:
            parser.error(f"--glibc {args.glibc}: not a version such as 2.34")
        if int(version[1]) < OLDEST_GLIBC:
            parser.error(f"--glibc {args.glibc}: 2.{OLDEST_GLIBC} is the oldest that wheels are fetched for")


if __name__ == "__main__":
    sys.exit(main())
