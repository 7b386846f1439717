"""What every result file says beside its numbers: when, at which commit, on what."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COMMIT = "MOLMO2_COMMIT"  # environment variable of a run without git (benchmarks/gpu)


def machine() -> dict[str, Any]:
    """Processor, cores, load before the run, and versions."""
    import numpy
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": [round(v, 2) for v in os.getloadavg()],
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def write_result(name: str, result: dict[str, Any], path: Path | None = None) -> Path:
    """Write `results/<name>-<date>.json` with date and commit; a commit ending in + had uncommitted changes."""
    now = datetime.now(timezone.utc)
    path = path or RESULTS / f"{name}-{now:%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"benchmark": name, "date": now.isoformat(timespec="seconds"), "commit": commit()}
    path.write_text(json.dumps(head | result, indent=1) + "\n")
    print(f"written to {path}")
    return path


def commit(root: Path = Path(__file__).parent) -> str:
    """The commit that is checked out, with + where files have changes; of a kit, the one that it was built of."""
    if COMMIT in os.environ:
        return os.environ[COMMIT]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
