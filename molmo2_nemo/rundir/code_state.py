"""Which code and packages ran, and by which command: kept in attempt.json, for cards. Nothing heavy is imported."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

COMMAND = "MOLMO2_COMMAND"  # variable with the command line that started the run
PACKAGES = (  # that decide what a run computes
    *("torch", "megatron-core", "nemo-toolkit", "lightning", "transformer-engine", "transformers", "tokenizers"),
    *("numpy", "av", "pillow", "triton", "flash-attn"),
)
OWN = "molmo2_nemo"


def code_state() -> dict[str, Any]:
    """What runs here: `command`, `commit`, `modified` (whether the checkout has changes that are not committed),
    `versions`; None where it is not known."""
    commit, modified = commit_of_code()
    return {
        "command": os.environ.get(COMMAND),
        "commit": commit,
        "modified": modified,
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> dict[str, str]:
    """Installed versions of this package and of PACKAGES; those that are not installed are left out."""
    found = {}
    for name in (OWN, *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit_of_code(root: Path | None = None) -> tuple[str | None, bool | None]:
    """The commit of this package's code, and whether it was changed since: from git where it runs from a checkout, else
    from what pip noted on installing it from a repository. None: not known.

    Args:
        root: where the checkout would be; default: this package's.
    """
    root = root or Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no") if commit else None
        return commit or None, None if changes is None else bool(changes)
    try:
        text = metadata.distribution(OWN).read_text("direct_url.json")
        commit = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    except (metadata.PackageNotFoundError, ValueError):
        commit = None
    return commit, False if commit else None


def _git(root: Path, *words: str) -> str | None:
    """What git says, None where it is not there or does not answer."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
