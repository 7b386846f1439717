"""What a run finds: the card, its clocks, versions. `python -m benchmarks.gpu.environment --out FILE`."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.report import machine

PACKAGES = (
    *("torch", "triton", "numpy", "megatron-core", "nemo-toolkit", "transformers", "lightning", "transformer-engine"),
    *("flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel", "apex"),
)
ASKED = "name,memory.total,driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.draw"


def environment() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"machine": machine(), "card": None, "packages": {n: _version(n) for n in PACKAGES}}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "card GiB": card.total_memory / 2**30, "cards": torch.cuda.device_count()}
        found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(), "nvidia-smi": nvidia_smi()}
    return found


def nvidia_smi() -> dict[str, str]:
    """What the driver says, by the names it has for it; nothing where it has no such program."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    lines = done.stdout.splitlines() or [""]
    return dict(zip(ASKED.split(","), (value.strip() for value in lines[0].split(",")), strict=False))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = environment()
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(f"{found['card'] or 'no card'}, torch {found['packages']['torch']}")


if __name__ == "__main__":
    main()
