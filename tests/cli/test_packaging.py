"""What pyproject.toml and the pins promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
    names = set()
    for file in ("cpu.txt", "dev.txt"):
        for line in (ROOT / "requirements" / file).read_text().splitlines():
            line = line.split("#")[0].strip()
            if line:
                assert re.fullmatch(r"[A-Za-z0-9._-]+==[^=\s]+", line), line
                name = line.split("==")[0].lower().replace("_", "-")
                assert name not in names, f"{name} twice"
                names.add(name)
    assert {"torch", "nemo-toolkit", "megatron-core", "webdataset"} <= names
    assert not names & {"torchvision", "nvidia-cuda-runtime", "triton"}


def test_direct_dependencies_are_pinned():
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["stack"]
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")
        assert name in pins, f"{name} is a dependency but not in requirements/cpu.txt"
        assert name not in ("nvidia", "torchvision")


def test_plain_install_brings_no_torch():
    names = {re.match(r"[A-Za-z0-9_-]+", r)[0].lower() for r in PROJECT["project"]["dependencies"]}
    assert not names & {"torch", "nemo_toolkit", "megatron-core", "lightning", "transformers", "torchvision"}
