"""A kit's manifest, and what unpack.py makes of a kit on a machine: refusals first."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.gpu import manifest as manifests
from benchmarks.gpu.build import COPIED
from benchmarks.gpu.manifest import Manifest, damaged, read

SOURCE = Path(manifests.__file__).parent
HERE = ".".join(platform.python_version_tuple()[:2])


def archive(path: Path, files: dict[str, str], scratch: Path) -> None:
    with tarfile.open(path, "w:xz") as tar:
        for name, text in files.items():
            (scratch / "file").write_text(text)
            tar.add(scratch / "file", arcname=name)


@pytest.fixture
def kit(tmp_path):
    """A kit for this machine with one package and one file of the project."""
    folder = tmp_path / "kit"
    folder.mkdir()
    for name in COPIED:
        shutil.copy(SOURCE / name, folder)
    archive(folder / "overlay.tar.xz", {"molmo2-overlay/site/some/__init__.py": "x = 1\n"}, tmp_path)
    archive(folder / "project.tar.xz", {"project/README.md": "# it\n"}, tmp_path)
    write(folder)
    return folder


def write(folder: Path, **changes: object) -> Manifest:
    numpy = version("numpy")
    fields: dict[str, object] = dict(
        date="2026-11-28", commit="a" * 40, python=HERE, machine=platform.machine(), glibc="2.17"
    )
    fields |= dict(beside={"numpy": numpy}, packages=["some==1"], left_out={}, files={}) | changes
    made = Manifest(**fields)
    made.write(folder)
    return made


def unpack(kit: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(kit / "unpack.py"), str(kit), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_file_is_recorded_and_compared(kit):
    manifest = read(kit)
    assert set(manifest.files) == {*COPIED, "overlay.tar.xz", "project.tar.xz"}
    assert manifest.mib == sum(p.stat().st_size for p in kit.iterdir() if p.name != manifests.NAME) / 2**20
    assert damaged(kit, manifest) == []
    (kit / "run.sh").write_text((kit / "run.sh").read_text().replace("set -e", "set +e"))
    (kit / "overlay.tar.xz").write_bytes(b"")
    (kit / "project.tar.xz").unlink()
    said = "; ".join(damaged(kit, manifest))
    assert "run.sh has another checksum" in said and "overlay.tar.xz has 0 bytes" in said
    assert "project.tar.xz is not there" in said


def test_a_kit_is_unpacked_once(kit, tmp_path):
    done = unpack(kit, tmp_path / "there")
    assert done.returncode == 0 and "unpacked in" in done.stdout, done.stderr
    site = tmp_path / "there" / "molmo2-overlay" / "site" / "some"
    assert (site / "__init__.py").is_file() and list(site.glob("__pycache__/*.pyc"))
    (tmp_path / "there" / "project" / "mine").write_text("changed by hand")
    assert "is in" in unpack(kit, tmp_path / "there").stdout
    assert (tmp_path / "there" / "project" / "mine").is_file()
    write(kit, commit="b" * 40)
    assert "commit bbbbbbbbbbbb, unpacked in" in unpack(kit, tmp_path / "there").stdout
    assert not (tmp_path / "there" / "project" / "mine").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"python": "3.9"}, "the kit is for 3.9: name one in MOLMO2_PYTHON"),
        ({"machine": "riscv64"}, "the kit is for riscv64: build one with --machine"),
        ({"glibc": "2.99"}, "the kit needs 2.99: build one with --glibc"),
    ],
)
def test_another_machine_is_refused_before_anything_is_unpacked(kit, tmp_path, changes, said):
    write(kit, **changes)
    done = unpack(kit, tmp_path / "there")
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "there").exists()


def test_a_damaged_kit_is_refused(kit, tmp_path):
    (kit / "overlay.tar.xz").write_bytes((kit / "overlay.tar.xz").read_bytes()[:-7])
    done = unpack(kit, tmp_path / "there")
    assert done.returncode == 2 and "were packed\nkit: copy the whole folder again" in done.stderr
    (kit / manifests.NAME).write_text(json.dumps({"date": "today"}))
    assert "is not the manifest of a kit" in unpack(kit, tmp_path / "there").stderr


@pytest.mark.parametrize("name", ["project", "molmo2-overlay", "thesis"])
def test_a_folder_with_something_else_in_it_is_left_alone(kit, tmp_path, name):
    mine = tmp_path / "there" / name / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    done = unpack(kit, tmp_path / "there")
    assert done.returncode == 2 and f"there has {name} in it, and no kit was unpacked there" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in (tmp_path / "there").rglob("*") if path.is_file()] == [mine]


def test_an_unpacking_that_was_cut_off_is_done_again(kit, tmp_path):
    there = tmp_path / "there"
    (there / "project").mkdir(parents=True)
    (there / "kit.sha256").write_text("unpacking")
    assert "unpacked in" in unpack(kit, there).stdout
    assert (there / "project" / "README.md").is_file()


def test_a_place_that_cannot_be_written_is_named(kit, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        done = unpack(kit, place)
        assert done.returncode == 2 and f"cannot unpack to {place} (MOLMO2_KIT names another folder)" in done.stderr
        assert "Traceback" not in done.stderr


def test_warnings_of_packages_while_they_are_compiled_are_not_shown(kit, tmp_path):
    archive(kit / "overlay.tar.xz", {"molmo2-overlay/site/old.py": "x = '\\d'\ny = 1 is 1\n"}, tmp_path)
    write(kit)
    done = unpack(kit, tmp_path / "there")
    assert done.returncode == 0 and done.stderr == ""


def start(words, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, env=os.environ | variables, capture_output=True, text=True)


def test_run_sh_takes_relative_paths_and_links(kit, tmp_path):
    """The kit's project answers with what run.sh gives it."""
    echo = "import os, sys; print(os.getcwd(), sys.executable, *sys.argv[1:])"
    files = {"project/benchmarks/__init__.py": "", "project/benchmarks/gpu/__init__.py": ""}
    archive(kit / "project.tar.xz", files | {"project/benchmarks/gpu/run.py": echo}, tmp_path)
    write(kit)
    here = tmp_path / "here"
    (here / "bin").mkdir(parents=True)
    (here / "bin" / "python").symlink_to(sys.executable)
    (here / "link.sh").symlink_to(kit / "run.sh")
    found = dict(MOLMO2_PYTHON="bin/python", MOLMO2_KIT="un packed", OUT="re sults")
    done = start(["./link.sh", "--list"], here, **found)
    assert done.returncode == 0, done.stderr
    cwd, python, rest = done.stdout.splitlines()[-1].replace("un packed", "UN").replace("re sults", "RE").split(" ", 2)
    assert cwd == str(here) and python == f"{here}/bin/python"
    assert f"--kit {kit} --data {kit}/data --out {here}/RE --begun " in rest and rest.endswith(" --list")
    assert not (here / "re sults").exists()
    lost = start([str(kit / "run.sh")], here, MOLMO2_PYTHON="no/python")
    assert lost.returncode == 2 and lost.stderr == f"kit: no such Python: {here}/no/python; name one in MOLMO2_PYTHON\n"


def test_other_versions_than_planned_are_said(kit, tmp_path):
    write(kit, beside={"numpy": "0.1", "pytest": version("pytest")})
    done = unpack(kit, tmp_path / "there")
    assert done.returncode == 0
    assert f"note: numpy {version('numpy')} is here, the kit was planned beside 0.1" in done.stdout
    assert done.stdout.count("note:") == 1
