"""What a kit says of itself: for which machine, of which commit, every file with its checksum, what was left out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

NAME = "manifest.json"
MIB = 2.0**20


@dataclass(frozen=True)
class Manifest:
    date: str
    commit: str  # of the project; ends in + where files had changes that were not committed
    python: str  # such as 3.12
    machine: str  # as uname -m says it
    glibc: str  # the oldest that all of it runs with
    beside: dict[str, str]  # packages of the machine that stay, and their versions when the kit was planned
    packages: list[str]  # NAME==VERSION of what the kit brings
    left_out: dict[str, str]  # what is not in it: why
    files: dict[str, dict[str, int | str]] = field(default_factory=dict)  # path in the kit -> bytes, sha256

    @property
    def mib(self) -> float:
        return sum(int(entry["bytes"]) for entry in self.files.values()) / MIB

    def write(self, kit: Path) -> None:
        """Records the kit's files as they are, and itself beside them."""
        self.files.clear()
        for path in sorted(p for p in kit.rglob("*") if p.is_file() and p.name != NAME):
            entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            self.files[str(path.relative_to(kit))] = entry
        (kit / NAME).write_text(json.dumps(asdict(self), indent=1) + "\n")


def read(kit: Path) -> Manifest:
    """Raises:
    ValueError: the file is not what `write` wrote, or is not there.
    """
    try:
        return Manifest(**json.loads((kit / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{kit / NAME} is not the manifest of a kit ({error}): copy the whole folder again") from error


def damaged(kit: Path, manifest: Manifest) -> list[str]:
    """What is not as the manifest says, a line each."""
    found = []
    for name, entry in manifest.files.items():
        path = kit / name
        if not path.is_file():
            found.append(f"{name} is not there")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were packed")
        elif sha256(path) != entry["sha256"]:
            found.append(f"{name} has another checksum than when it was packed")
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
