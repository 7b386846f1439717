"""Which versions of the libraries are taken, and which refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from molmo2_nemo import compat
from molmo2_nemo.errors import UserError


@pytest.fixture
def versions(monkeypatch):
    """Lets a test say what is installed; the rest is as tried."""
    made = {name: tried.versions[0] for name, tried in compat.TRIED.items()} | {"torch": "2.13.0"}
    monkeypatch.setattr(compat, "installed", made.get)
    return made


def test_what_is_installed_here_was_tried():
    assert list(compat.problems()) == []
    for name, tried in compat.TRIED.items():
        assert all(compat.fits(version, tried.accepted) for version in tried.versions), name


@pytest.mark.parametrize(
    ("name", "version"),
    [
        *(("megatron-core", v) for v in ("0.16.0rc1", "0.16.0", "0.17.0", "0.18.0+nv26.4", "0.19.2")),
        *(("torch", v) for v in ("2.6.0", "2.10.0a0+git1234", "2.11.0+cu130", "2.13.0+cpu")),
        *(("nemo-toolkit", v) for v in ("2.7.0rc0", "2.7.0", "2.7.3")),
        ("numpy", "2.4.6"),
    ],
)
def test_versions_of_images_are_taken(versions, name, version):
    versions[name] = version
    compat.check()


@pytest.mark.parametrize(
    ("name", "version"),
    [
        *(("megatron-core", v) for v in ("0.15.3", "0.20.0rc0", "0.20.0", "1.0", "unreadable")),
        *(("torch", v) for v in ("2.5.1+cu124", "3.0")),
        *(("nemo-toolkit", v) for v in ("2.6.2", "3.0.0")),
        *(("transformers", v) for v in ("5.0.0", "4.50.0")),
        ("numpy", "1.25.2"),
    ],
)
def test_a_version_that_was_not_tried_is_refused(versions, name, version, monkeypatch, capsys):
    versions[name] = version
    with pytest.raises(UserError) as refused:
        compat.check()
    message = str(refused.value)
    assert f"{name} {version} was not tried" in message  # what is there
    assert compat.TRIED[name].versions[0] in message and compat.TRIED[name].get in message  # what was, how to get it
    monkeypatch.setenv(compat.UNTRIED, "1")
    compat.check()
    assert f"{name} {version} was not tried" in capsys.readouterr().err


def test_an_old_python_is_refused(versions, monkeypatch):
    for version, good in {(3, 9, 1): False, (3, 10, 0): True, (3, 12, 9): True, (3, 13, 0): False}.items():
        monkeypatch.setattr(compat.sys, "version_info", version)
        assert (list(compat.problems()) == []) == good, version


def test_the_first_line_names_what_runs(versions):
    versions["megatron-core"] = "0.18.2"
    assert compat.stack().startswith("megatron-core 0.18.2, nemo-toolkit 2.7.3, torch 2.13.0, transformers 4.57.6, Pyt")


def test_lines_of_megatron_core(versions):
    compat.core_at_least.cache_clear()
    for version, lines in {"0.16.1": (True, False), "0.17.0rc2": (True, True), "0.19.2": (True, True)}.items():
        versions["megatron-core"] = version
        assert (compat.core_at_least("0.16"), compat.core_at_least("0.17")) == lines, version
        compat.core_at_least.cache_clear()


def test_line_of_a_version():
    lines = {"0.17.1": (0, 17), "0.18rc1": (0, 18), "1": (1, 0), "0.18.0+nv26.4": (0, 18), "dev": (0, 0), None: (0, 0)}
    assert {version: compat.line_of(version) for version in lines} == lines


def test_a_source_checkout_before_the_installed_one_counts(tmp_path, monkeypatch):
    """It is what will be imported, so it is named, mended and, where it was not tried, refused."""
    source = tmp_path / "megatron" / "core"
    source.mkdir(parents=True)
    (source / "package_info.py").write_text(
        "MAJOR = 0\nMINOR = 25\nPATCH = 3\nPRE_RELEASE = 'rc1'\nVERSION = (MAJOR,)\n"
    )
    code = "from molmo2_nemo import compat; print(compat.installed('megatron-core'), *compat.problems())"
    paths = [str(tmp_path), str(Path(compat.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("0.25.3rc1 megatron-core 0.25.3rc1 was not tried"), done.stderr
