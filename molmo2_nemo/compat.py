"""The libraries underneath: which versions were tried, and which are here. What differs between them is in
differences.py; nothing else knows of versions.

TRIED is what `molmo2 doctor`, the first line of a run and the container build go by.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError


@dataclass(frozen=True)
class Tried:
    """Versions of one distribution.

    Args:
        accepted: a run starts with these, as a version specifier (PEP 440).
        versions: the tests were run with these.
        why: what the bounds come from.
        get: the command that installs a good one.
    """

    accepted: str
    versions: tuple[str, ...]
    why: str
    get: str


PINS = "make venv, or pip install --no-deps -r requirements/cpu.txt; in a container: an NGC NeMo image from 26.02 on"
TRIED = {
    "megatron-core": Tried(
        ">=0.16.0rc0,<0.20",
        ("0.16.1", "0.17.1", "0.18.2", "0.19.2"),
        "each line of it changes names that NeMo 2.7 and checkpoints rely on",
        "pip install --no-deps megatron-core==0.16.1, or on Python 3.12 megatron-core==0.19.2",
    ),
    "torch": Tried(
        ">=2.6,<2.16",
        ("2.6.0", "2.11.0", "2.13.0", "2.14.1", "2.15.0"),
        "FlexAttention and torch.distributed as used here",
        PINS,
    ),
    "nemo-toolkit": Tried(
        ">=2.7rc0,<2.8",
        ("2.7.3",),
        "the last line with MegatronStrategy; NeMo 3 has dropped it",
        "pip install --no-deps nemo-toolkit==2.7.3",
    ),
    "transformers": Tried(
        ">=4.55,<5",
        ("4.57.6",),
        "NeMo 2.7 imports what transformers 5 has dropped",
        "pip install --no-deps transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2",
    ),
    "lightning": Tried(">=2.4,<2.6", ("2.4.0",), "what NeMo 2.7 builds on", "pip install --no-deps lightning==2.4.0"),
    "numpy": Tried(">=1.26,<3", ("1.26.4", "2.4.6"), "what Megatron-core is built against", PINS),
    "hydra-core": Tried(">=1.3,<1.4", ("1.3.2",), "its override grammar", "pip install hydra-core==1.3.2"),
}
PYTHON = ((3, 10), (3, 12))  # first and last that are accepted
SHOWN = ("megatron-core", "nemo-toolkit", "torch", "transformers")  # in the first line of a run, and in checkpoints


@cache
def installed(name: str) -> str | None:
    """Version of a distribution, None where it is not installed. Of Megatron-core, the one that an import would find,
    which may be a checkout of its source in front of the one that pip knows."""
    if name == "megatron-core" and (found := _core_in_source()) is not None:
        return found
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _core_in_source() -> str | None:
    """The version in megatron/core/package_info.py, read as text: importing it would import all of Megatron-core."""
    spec = importlib.util.find_spec("megatron")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "core" / "package_info.py"
        if path.is_file():
            parts = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) = ['\"]?(\w*)['\"]?", path.read_text(), re.M))
            if {"MAJOR", "MINOR", "PATCH"} <= set(parts):
                return f"{parts['MAJOR']}.{parts['MINOR']}.{parts['PATCH']}{parts.get('PRE_RELEASE', '')}"
            return None
    return None


def logger_problems(wanted: Mapping[str, str | None]) -> Iterator[str]:
    """Why nothing can be logged where a run asks, one line for each service whose package is not installed.

    Args:
        wanted: "wandb", "mlflow" -> the project or experiment there; None: not asked for.
    """
    for name, where in wanted.items():
        if where is not None and importlib.util.find_spec(name) is None:
            yield f"log.{name}={where}: the package {name} is not installed; pip install {name}, or log.{name}=null"


def fits(found: str, accepted: str) -> bool:
    """Whether a version is within a specifier; local parts ("+cpu", "+cu130", "+nv25.1") do not count."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(accepted).contains(Version(found).public, prereleases=True)
    except InvalidVersion:
        return False


def problems() -> Iterator[str]:
    """What is installed in a version that was not tried, one sentence each: what is there, what was tried, how to get
    it. What is not installed at all is `molmo2 doctor`'s to say."""
    here = sys.version_info[:2]
    if not PYTHON[0] <= here <= PYTHON[1]:
        first, last = (".".join(map(str, v)) for v in PYTHON)
        yield f"Python {here[0]}.{here[1]} was not tried; {first} to {last} are taken: make venv PYTHON=python3.12"
    for name, tried in TRIED.items():
        found = installed(name)
        if found is not None and not fits(found, tried.accepted):
            run = ", ".join(tried.versions)
            yield f"{name} {found} was not tried; {tried.accepted} is taken, {run} was run ({tried.why}): {tried.get}"


UNTRIED = "MOLMO2_UNTRIED"  # environment variable; 1 lets a run start all the same


def check() -> None:
    """Refuses to run on versions that were not tried.

    Raises:
        UserError: names them, unless UNTRIED is 1: then they are printed.
    """
    found = list(problems())
    if found and os.environ.get(UNTRIED) != "1":
        raise UserError(f"{'; '.join(found)}. {UNTRIED}=1 in the environment runs it all the same, at your own risk")
    for problem in found:
        print(f"warning: {problem}", file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    """The versions that will run, of what matters most: distribution -> version."""
    return {name: found for name in SHOWN if (found := installed(name))}


def stack() -> str:
    """The same in a line of a run's output: "megatron-core 0.16.1, nemo-toolkit 2.7.3, ..."."""
    shown = [f"{name} {found}" for name, found in versions().items()]
    return ", ".join([*shown, f"Python {sys.version_info[0]}.{sys.version_info[1]}"])


def line_of(version: Any) -> tuple[int, ...]:
    """The line that a version belongs to, "0.17.1rc0" -> (0, 17); (0, 0) of what is no version."""
    from packaging.version import InvalidVersion, Version

    try:
        return (*Version(version).release, 0)[:2]
    except (InvalidVersion, TypeError):
        return (0, 0)


@cache
def core_at_least(wanted: str) -> bool:
    """Whether Megatron-core is of this line or a later one: core_at_least("0.17"). Its pre-releases count."""
    found = installed("megatron-core")
    assert found is not None, "megatron-core is not installed"
    return line_of(found) >= line_of(wanted)
