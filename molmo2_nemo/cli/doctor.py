"""What of the stack is installed, in which versions, and what to do about what is missing.

Exit code 0 when a run can start here, 1 when something it needs is missing."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

EXAMPLES = """\
examples:
  molmo2 doctor
"""

PINS = "pip install --no-deps -r requirements/cpu.txt (or make venv; in an NGC NeMo container it is there already)"
NEEDED = {
    "torch": ("the tensors and the processes", PINS),
    "megatron-core": ("the parallel layers", PINS),
    "nemo-toolkit": ("the trainer", PINS),
    "lightning": ("the trainer", PINS),
    "nemo_run": ("recipes and launchers", PINS),
    "hydra-core": ("configuration", "pip install hydra-core==1.3.2"),
    "webdataset": ("shards", "pip install webdataset"),
    "av": ("video decoding", "pip install av"),
    "pillow": ("picture decoding", "pip install pillow"),
    "lhotse": ("subtitles", "pip install lhotse"),
    "tokenizers": ("text", "pip install tokenizers"),
    "safetensors": ("weights", "pip install safetensors"),
    "rich": ("tables", "pip install rich"),
}
OPTIONAL = {
    "transformers": "NeMo's own Hugging Face paths",
    "nvidia-modelopt": "llm.import_ckpt and llm.export_ckpt of NeMo",
    "tensorboard": "reading the event files",
    "matplotlib": "the demo's picture of the curves",
    "transformer-engine": "GPU: fused layers",
    "flash-attn": "GPU: attention kernels",
}
TESTED = {"torch": "2.13.0", "megatron-core": "0.16.1", "nemo-toolkit": "2.7.3", "lightning": "2.4.0"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    missing = []
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    if not (3, 10) <= sys.version_info[:2] < (3, 13):
        print("  ! tested with Python 3.10 to 3.12 only")
    for name, (use, fix) in NEEDED.items():
        found = version_of(name)
        print(_line(name, found, use))
        if found is None:
            missing.append((name, fix))
    print("optional")
    for name, use in OPTIONAL.items():
        print(_line(name, version_of(name), use))
    if version_of("torch"):
        _devices()
    print(f"disk: {shutil.disk_usage('.').free / 2**30:.0f} GiB free here")
    for name, fix in missing:
        print(f"missing: {name}; {fix}")
    if not missing:
        print("ready: molmo2 demo")
    return 1 if missing else 0


def version_of(name: str) -> str | None:
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return None


def _line(name: str, found: str | None, use: str) -> str:
    tested = TESTED.get(name)
    note = f"  (tested with {tested})" if found and tested and found.split("+")[0] != tested else ""
    return f"  {name:<20} {found or '-':<14} {use}{note}"


def _devices() -> None:
    """What torch says it can run on."""
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a broken torch is exactly what this verb is asked about
        print(f"  ! torch does not import: {error}; docs/install.md says which build to take")
        return
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        print(f"devices: {torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}")
    else:
        print("devices: no GPU; runs use the CPU with gloo")
    if not dist.is_available() or not dist.is_gloo_available():
        print("  ! this torch has no gloo: several CPU processes cannot work together")
