"""Stacks: a Python with its pins, and the folders that put other versions before them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITH_TORCH = ("torch", "functorch", "nvidia", "cuda", "triton", "cusparselt", "sympy")
NAMES = {"core": "megatron-core", "torch": "torch", "numpy": "numpy"}  # what a stack may have in another version


@dataclass(frozen=True)
class Stack:
    """One row of the matrix. Versions as pip writes them, without local parts."""

    python: str
    core: str
    torch: str
    numpy: str

    def __str__(self) -> str:
        return f"Python {self.python}, Megatron-core {self.core}, torch {self.torch}, numpy {self.numpy}"


@dataclass(frozen=True)
class Installed:
    """A stack that is there: its Python, and the environment that puts its folders first."""

    stack: Stack
    executable: Path
    environment: dict[str, str]

    def run(self, *words: str, log: Path) -> int:
        """`python WORDS` from the project's root, output to a file; returns the exit code."""
        with log.open("w") as file:
            command = [str(self.executable), *words]
            return subprocess.run(command, cwd=ROOT, env=self.environment, stdout=file, stderr=file).returncode


def install(stack: Stack, folder: Path) -> Installed:
    """The stack, installed under `folder` where it is not there yet, and asked what it is.

    Raises:
        SystemExit: something cannot be installed, or another version than wanted is imported.
    """
    executable = _environment(stack.python, folder)
    plain = {name: v for name, v in os.environ.items() if not name.startswith(("PYTEST", "MOLMO2", "PYTHONPATH"))}
    pinned = _versions(executable, plain)
    before = [
        _in_a_folder(executable, name, getattr(stack, key), folder / f"py{stack.python}-{name}-{getattr(stack, key)}")
        for key, name in NAMES.items()
        if pinned[name] != getattr(stack, key)
    ]
    environment = {**plain, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *before])), "OMP_NUM_THREADS": "1"}
    found = _versions(executable, environment)
    wanted = {name: getattr(stack, key) for key, name in NAMES.items()}
    if {name: found[name] for name in wanted} != wanted:
        raise SystemExit(f"{stack}: {found} is imported instead")
    return Installed(stack, executable, environment)


def _environment(python: str, folder: Path) -> Path:
    """The pinned environment of a Python: the one that runs this, or one made with `make venv`."""
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == python:
        return Path(sys.executable)
    home = (folder / f"py{python}").absolute()
    command = ["make", "--no-print-directory", "venv", f"VENV={home}", f"PYTHON={_interpreter(python)}"]
    _call(command, f"Python {python}'s environment")
    return home / "bin" / "python"


def _interpreter(python: str) -> str:
    """A Python of that line: on the PATH, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for name in (f"python{python}", *map(str, sorted(pyenv.glob(f"{python}.*/bin/python")))):
        if shutil.which(name) and subprocess.run([name, "-c", ""], capture_output=True).returncode == 0:
            return name
    raise SystemExit(f"no Python {python} on the PATH; install it")


def _in_a_folder(executable: Path, name: str, version: str, target: Path) -> Path:
    """A distribution in a folder of its own; torch with all that it needs, the others alone."""
    if not (target / ".installed").exists():
        shutil.rmtree(target, ignore_errors=True)
        alone = [] if name == "torch" else ["--no-deps"]
        command = [str(executable), "-m", "pip", "install", "-qq", *alone, "--target", str(target)]
        _call([*command, f"{name}=={version}"], f"{name} {version}")
        if name == "torch":
            for found in target.iterdir():  # the rest is in the environment already, in the version that NeMo wants
                if not found.name.startswith(WITH_TORCH):
                    shutil.rmtree(found) if found.is_dir() else found.unlink()
        (target / ".installed").touch()
    return target


def _call(command: list[str], what: str) -> None:
    print(f"installing {what}", flush=True)
    free = os.environ | {"PIP_CONSTRAINT": os.devnull}  # a machine's own caps are not what is tried here
    done = subprocess.run(command, cwd=ROOT, env=free, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} cannot be installed: {done.stdout[-1000:]}{done.stderr[-2000:]}")


def _versions(executable: Path, environment: dict[str, str]) -> dict[str, str]:
    """What is imported, by the metadata that goes with it; local parts ("+cpu") cut off."""
    code = (
        "from importlib.metadata import version; import sys; [print(n, version(n).split('+')[0]) for n in sys.argv[1:]]"
    )
    command = [str(executable), "-c", code, *NAMES.values()]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{executable}: {done.stderr[-1000:]}")
    return dict(line.split() for line in done.stdout.splitlines())
