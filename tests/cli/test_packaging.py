"""What pyproject.toml and the pins promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from molmo2_nemo import compat
from molmo2_nemo.settings.compose import conf_dir

ROOT = Path(__file__).resolve().parents[2]
tomllib = pytest.importorskip("tomllib")  # in the standard library from Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_installed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    for top in ("molmo2_nemo", "data_prep"):
        found = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / top).rglob("__init__.py")}
        assert found <= listed, f"add {sorted(found - listed)} to [tool.setuptools] packages"


def test_every_data_file_is_installed():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    folders = {"data_prep": "data_prep", "molmo2_nemo.conf": "conf", "molmo2_nemo.recipes": "recipes"}
    folders["molmo2_nemo.data"] = "molmo2_nemo/data"
    for package, folder in folders.items():
        covered = {p for pattern in data[package] for p in (ROOT / folder).glob(pattern)}
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert path in covered, f"{path} is not installed; extend package-data of {package}"


def test_the_configuration_is_found():
    assert (conf_dir() / "config.yaml").is_file()


def test_pins_are_exact_and_without_torchvision():
    for python in ("3.11", "3.12"):
        names = set()
        for pin in pins("cpu.txt", "dev.txt", python=python):
            assert re.fullmatch(r"==[^=*]+", str(pin.specifier)), pin
            name = canonicalize_name(pin.name)
            assert name not in names, f"{name} twice"
            names.add(name)
        assert {"torch", "nemo-toolkit", "megatron-core", "webdataset"} <= names
        assert not {name for name in names if name == "torchvision" or name.startswith("nvidia-cu")}
        assert ("triton" in names) == (python == "3.12")


def test_megatron_core_of_the_pins_was_tried():
    for python in ("3.11", "3.12"):
        pinned = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins("cpu.txt", python=python)}
        for name in ("megatron-core", "nemo-toolkit", "torch", "transformers", "lightning", "numpy", "hydra-core"):
            assert pinned[name].removeprefix("==") in compat.TRIED[name].versions, (python, name)


def pins(*files: str, python: str) -> list[Requirement]:
    """The requirements of these files that hold for a version of Python."""
    lines = [line.split("#")[0].strip() for f in files for line in (ROOT / "requirements" / f).read_text().splitlines()]
    all_pins = [Requirement(line) for line in lines if line]
    return [pin for pin in all_pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]


def test_direct_dependencies_are_pinned():
    pinned = {canonicalize_name(pin.name) for pin in pins("cpu.txt", python="3.11")}
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["stack"]
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")
        assert name in pinned, f"{name} is a dependency but not in requirements/cpu.txt"
        assert name not in ("nvidia", "torchvision")


def test_plain_install_brings_no_torch():
    names = {re.match(r"[A-Za-z0-9_-]+", r)[0].lower() for r in PROJECT["project"]["dependencies"]}
    assert not names & {"torch", "nemo_toolkit", "megatron-core", "lightning", "transformers", "torchvision"}
