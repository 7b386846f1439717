"""Wheels of pinned packages: fetched with pip for one environment, read for what they ask for, laid out as a folder."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from email.parser import HeaderParser
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename
except ImportError:  # an environment as pip makes it
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

OLDEST_GLIBC = 17  # of 2.17, manylinux2014: wheels for it and for older ones are taken for every machine
OLDEST_TAG = 5  # manylinux_2_5 is manylinux1
# What no run opens, by rules that hold for every package: sources of compiled code, stubs of types, byte code, commands
# and shared data; tests, unless the package imports them. PuLP's solvers are programs that only a search for a
# quantisation would start.
UNUSED = re.compile(
    r"(^|/)__pycache__/|\.(c|cc|cpp|cu|cuh|h|hpp|pyi|pyx|pxd|a)$|^(bin|share|include)/|^pulp/solverdir/"
)

TESTS = ("test", "tests")


class PackageError(Exception):
    """pip could not do something; the text says what."""


class Wheels:
    """A folder of wheels, for the environment that runs this or for another."""

    def __init__(self, folder: Path, python: str | None = None, machine: str = "x86_64", glibc: str = "2.34"):
        """Args:
        folder: where the wheels go; pip's own helpers, too.
        python: version of the environment they are for, such as 3.12; None: the one that runs this.
        machine: its kind of CPU, as `uname -m` says it.
        glibc: the version of its C library.
        """
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.flags: list[str] = []
        if python is not None:
            newest = int(glibc.split(".")[1])
            platforms = [f"manylinux_2_{n}_{machine}" for n in range(newest, OLDEST_TAG - 1, -1)]
            platforms += [f"manylinux{n}_{machine}" for n in ("2014", "2010", "1")]
            self.flags = ["--python-version", python, "--implementation", "cp"]
            self.flags += [word for name in platforms for word in ("--platform", name)]
        self._pip: list[str] = []

    def fetch(self, pins: Sequence[str]) -> None:
        """Downloads the wheels of NAME==VERSION lines; a package without one is built, if it is plain Python."""
        new = [pin for pin in pins if canonicalize_name(pin.partition("==")[0]) not in self.files]
        if not new:
            return
        for part in ("fetched", "built"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.pip("download", "--no-deps", *self.flags, "--dest", str(self.folder / "fetched"), *new)
        for source in (p for p in (self.folder / "fetched").iterdir() if p.suffix != ".whl"):
            self.build(source)
            source.unlink()
        self._list()

    def build(self, source: Path) -> None:
        """A wheel from a source distribution or a project's folder."""
        self.pip("wheel", "--no-deps", "--wheel-dir", str(self.folder / "built"), str(source))
        compiled = [p.name for p in (self.folder / "built").glob("*.whl") if not p.name.endswith("-any.whl")]
        if self.flags and compiled:
            raise PackageError(f"{compiled[0]} was compiled for this machine: the index has no wheel for the other one")
        self._list()

    def _list(self) -> None:
        for path in self.folder.glob("*/*.whl"):
            self.files[canonicalize_name(parse_wheel_filename(path.name)[0])] = path

    def requires(self, name: str) -> list[Requirement]:
        """What the wheel of a package (by its canonical name) asks for, markers included."""
        with zipfile.ZipFile(self.files[name]) as wheel:
            (path,) = (n for n in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            headers = HeaderParser().parsestr(wheel.read(path).decode())
        return [Requirement(line) for line in headers.get_all("Requires-Dist") or []]

    def lay_out(self, names: Iterable[str], site: Path) -> None:
        """Unpacks the wheels into a folder for PYTHONPATH; with byte code, where it is for this environment."""
        # pip compares a wheel at hand with the Python that runs pip, not with the one named, which it was fetched for
        other = ["--only-binary=:all:", "--no-compile", "--ignore-requires-python"]
        target = [*self.flags, *other] if self.flags else ["--compile"]
        files = [str(self.files[name]) for name in sorted(names)]
        self.pip("install", "--no-index", "--no-deps", *target, "--target", str(site), *files)

    def install(self, names: Iterable[str]) -> None:
        """Into the environment that runs this."""
        files = [str(self.files[name]) for name in sorted(names)]
        environment = ["--python", sys.executable] if self._pip[0] != sys.executable else []
        self.pip(*environment, "install", "--no-index", "--no-deps", "--break-system-packages", *files)

    def pip(self, *arguments: str) -> None:
        """Runs pip; of this environment, or of one made for it where it has none.

        PIP_CONSTRAINT goes: NVIDIA's PyTorch images set it to their own versions, and this comes beside those."""
        self._pip = self._pip or self._find_pip()
        env = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}
        env |= {"PIP_NO_CACHE_DIR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
        done = subprocess.run([*self._pip, "-q", *arguments], env=env, text=True, stderr=subprocess.PIPE)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise PackageError(f"pip {arguments[0]} failed:\n" + "\n".join(lines[-8:]))

    def _find_pip(self) -> list[str]:
        if PathFinder.find_spec("pip") is not None:  # importlib.util.find_spec has setuptools change distutils here
            return [sys.executable, "-m", "pip"]
        home = self.folder / "pip"
        made = subprocess.run([sys.executable, "-m", "venv", str(home)], text=True, capture_output=True)
        if made.returncode:
            said = (made.stderr or made.stdout).strip().splitlines()
            raise PackageError(
                f"{sys.executable} has no pip and cannot make an environment that has ({said[-1] if said else ''}): "
                "add pip to the base image (RUN uv pip install pip, or apt-get install python3-venv)"
            )
        return [str(home / "bin" / "python"), "-m", "pip"]


def build_project(wheels: Wheels, root: Path) -> str:
    """The wheel of this project, built from a copy: a build leaves folders behind. Returns its canonical name."""
    copy = wheels.folder / "project"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    for name in ("conf", "data_prep", "molmo2_nemo", "recipes"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    wheels.build(copy)
    return "molmo2-nemo"


def pack(folder: Path, archive: Path) -> tuple[int, int]:
    """An overlay's folder, less what no run opens, as .tar.gz or .tar.xz (a quarter smaller, and minutes to pack).
    Returns the number of files and their bytes."""
    files = [path.relative_to(folder) for path in sorted(p for p in folder.rglob("*") if p.is_file())]
    wanted = [f for f in files if f.parts[0] != "site" or not _is_unused(folder / "site", f.parts[1:])]
    return pack_files(wanted, folder, archive, "molmo2-overlay")


def pack_files(files: Iterable[Path | str], folder: Path, archive: Path, inside: str) -> tuple[int, int]:
    """Files of a folder, by their paths in it, as .tar.gz or .tar.xz; `inside` is the folder in the archive.
    Returns the number of files and their bytes."""
    count = size = 0
    part = archive.with_name(f".{archive.name}.part")
    try:
        with (
            tarfile.open(part, "w:xz")
            if archive.suffix == ".xz"
            else tarfile.open(part, "w:gz", compresslevel=7) as tar
        ):
            for name in files:
                tar.add(folder / name, arcname=f"{inside}/{name}", filter=_plain)
                count, size = count + 1, size + (folder / name).stat().st_size
        part.rename(archive)
    finally:
        part.unlink(missing_ok=True)
    return count, size


def _is_unused(site: Path, parts: tuple[str, ...]) -> bool:
    if UNUSED.search("/".join(parts)):
        return True
    tests = [number for number, name in enumerate(parts[:-1]) if name in TESTS]
    return any(not _is_imported(site.joinpath(*parts[: number + 1])) for number in tests)


@cache
def _is_imported(tests: Path) -> bool:
    """Whether the package that a folder of tests lies in imports it when it is imported itself."""
    package = tests.parent / "__init__.py"
    if not package.is_file():
        return False
    for node in ast.walk(ast.parse(package.read_text(errors="replace"))):
        if isinstance(node, ast.ImportFrom):
            base = "" if node.level else f"{tests.parent.name}."
            names = [node.module or "", *(f"{node.module or ''}.{alias.name}" for alias in node.names)]
            if any(f"{name.strip('.')}.".startswith(f"{base}{tests.name}.") for name in names):
                return True
        elif isinstance(node, ast.Import):
            if any(f"{alias.name}.".startswith(f"{tests.parent.name}.{tests.name}.") for alias in node.names):
                return True
    return False


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nobody's file, readable by everyone."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode |= 0o444
    return member
