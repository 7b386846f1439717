"""python unpack.py KIT FOLDER: checks a kit and this machine, and unpacks it. Called by run.sh; standard library only.

FOLDER gets project/ (this project's files), molmo2-overlay/ (the packages that the machine lacks; bin/molmo2 starts the
command with them) and the stamp of the kit it came from. What is there from the same kit stays, what is there from
another is replaced; a folder with anything else in it is refused.
"""

from __future__ import annotations

import compileall
import os
import platform
import shutil
import sys
import tarfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import manifest as manifests

ARCHIVES = ("project.tar.xz", "overlay.tar.xz")
STAMP = "kit.sha256"
UNFINISHED = "unpacking"  # stands in the stamp meanwhile


def problems(manifest: manifests.Manifest) -> list[str]:
    """Why this machine cannot run the kit."""
    found = []
    python = ".".join(platform.python_version_tuple()[:2])
    if python != manifest.python:
        found.append(
            f"{sys.executable} is Python {python}, the kit is for {manifest.python}: name one in MOLMO2_PYTHON"
        )
    if platform.machine() != manifest.machine:
        found.append(f"this is {platform.machine()}, the kit is for {manifest.machine}: build one with --machine")
    library, number = platform.libc_ver()
    if library == "glibc" and _numbers(number) < _numbers(manifest.glibc):
        found.append(f"glibc {number} is here, the kit needs {manifest.glibc}: build one with --glibc {number}")
    for name in ("torch", "numpy", "triton"):
        try:
            version(name)
        except PackageNotFoundError:
            if name in manifest.beside:
                found.append(f"{sys.executable} has no {name}: the kit brings none, name a Python that has it")
    return found


def differences(manifest: manifests.Manifest) -> list[str]:
    """Packages of this machine whose versions are others than the kit was planned beside; said, not refused."""
    found = []
    for name, planned in manifest.beside.items():
        try:
            here = version(name).split("+")[0]
        except PackageNotFoundError:
            here = "missing"
        if here != planned:
            found.append(f"{name} {here} is here, the kit was planned beside {planned}")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def unpack(kit: Path, folder: Path) -> bool:
    """Unpacks the archives and compiles byte code on all cores. False: it was there already.

    Raises:
        FileExistsError: the folder has something in it, and no kit was unpacked there.
        OSError: it cannot be written.
    """
    stamp = manifests.sha256(kit / manifests.NAME)
    ours = (folder / STAMP).is_file()
    if ours and (folder / STAMP).read_text() == stamp:
        return False
    if not ours and folder.is_dir() and (found := sorted(path.name for path in folder.iterdir())):
        raise FileExistsError(
            f"{folder} has {found[0]}{' and more' * (len(found) > 1)} in it, and no kit was unpacked there (it has no "
            f"{STAMP}): name a folder that is empty or not there in MOLMO2_KIT"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAMP).write_text(UNFINISHED)
    for name in ("project", "molmo2-overlay"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    for name in ARCHIVES:
        with tarfile.open(kit / name) as tar:
            tar.extractall(folder, filter="data")
    warnings.simplefilter("ignore", SyntaxWarning)  # of packages for older Pythons, in this process and those it forks
    os.environ["PYTHONWARNINGS"] = "ignore::SyntaxWarning"  # and in those that it starts otherwise
    for name in ("molmo2-overlay/site", "project"):
        compileall.compile_dir(str(folder / name), quiet=2, workers=0)
    (folder / STAMP).write_text(stamp)
    return True


def main(kit: Path, folder: Path) -> int:
    try:
        manifest = manifests.read(kit)
    except ValueError as error:
        print(f"kit: {error}", file=sys.stderr)
        return 2
    wrong = manifests.damaged(kit, manifest)
    if wrong:
        wrong = [*wrong, "copy the whole folder again"]
    if wrong := wrong or problems(manifest):
        print("\n".join(f"kit: {line}" for line in wrong), file=sys.stderr)
        return 2
    for line in differences(manifest):
        print(f"kit: note: {line}")
    try:
        made = unpack(kit, folder)
    except OSError as error:
        named = isinstance(error, FileExistsError) and error.errno is None
        where = "" if named else f"cannot unpack to {folder} (MOLMO2_KIT names another folder): "
        print(f"kit: {where}{error}", file=sys.stderr)
        return 2
    print(f"kit: of {manifest.date}, commit {manifest.commit[:12]}, {'unpacked in' if made else 'is in'} {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
