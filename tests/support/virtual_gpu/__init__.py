"""A GPU that is not there, for machines without one: what the host does on CUDA is the real thing, no number is.

`runtime.c` takes the place of NVIDIA's CUDA runtime, cuBLAS and NCCL under a CUDA build of PyTorch. Device memory is
address space of a card's size, kernels are counted by name and do nothing, other ranks are imagined. PyTorch's caching
allocator, streams, events, the choice of kernels, autograd, the search for waiting calls
(`torch.cuda.set_sync_debug_mode`), Megatron and NeMo run as on a card: so memory, calls and waits can be tested, with
models and packs of full size. Triton compiles its kernels. Not
simulated: results, time, cuDNN's attention, the driver's virtual memory (expandable segments).

    run("benchmarks.train_step", "--model", "4b", "--stages", "sft", gib=80)        a module's main, in its own process

A process under it switches off what judges numbers (`process.py`): every loss is 0 or whatever lay in memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("runtime.c")
H100 = 79.65  # GiB that a card of 80 GB has
HEADERS = ("cuda_runtime_api.h", "crt/host_defines.h")


@dataclass(frozen=True)
class Report:
    """What a process and those that it started did on the virtual GPU."""

    returncode: int
    output: str  # of both streams
    launches: dict[str, int]  # kernel, product or collective (as the linker names it) -> times, of all processes
    waiting: dict[str, int]  # lines that waited for the device while gradients were computed -> times
    most_used: int  # bytes of device memory that PyTorch held at most in a process

    def launched(self, *parts: str) -> int:
        """Launches of kernels whose name holds one of the parts."""
        return sum(n for name, n in self.launches.items() if any(part in name for part in parts))


@functools.cache
def problem() -> str | None:
    """Why there can be no virtual GPU here, or None."""
    if sys.platform != "linux":
        return f"a virtual GPU needs Linux, this is {sys.platform}"
    if shutil.which("gcc") is None:
        return "a virtual GPU needs gcc"
    import torch

    if torch.cuda.is_available():
        return "there is a real GPU"
    if not (torch.version.cuda or "").startswith("13."):
        return f"a virtual GPU needs PyTorch built for CUDA 13, this is {torch.__version__}"
    if not all(any(folder.joinpath(name).is_file() for folder in _include()) for name in HEADERS):
        return f"a virtual GPU needs the headers {', '.join(HEADERS)} of the packages nvidia-cuda-runtime and triton"
    return None


def _include() -> list[Path]:
    packages = Path(sysconfig.get_path("purelib"))
    return [packages / "nvidia" / "cu13" / "include", packages / "triton" / "backends" / "nvidia" / "include"]


@functools.cache
def library() -> Path:
    """The compiled runtime, made once per source and user.

    Its name is the driver's, for PyTorch opens libcuda.so.1 by name and finds it loaded.
    """
    digest = hashlib.sha256(SOURCE.read_bytes() + str(_include()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"molmo2-virtual-gpu-{os.getuid()}-{digest}", "libcuda.so.1")
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            flags = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{path.name}", *(f"-I{inc}" for inc in _include())]
            subprocess.run(["gcc", *flags, "-o", made, SOURCE, "-lpthread"], check=True)
            made.rename(path)
    return path


def run(
    module: str,
    *arguments: str,
    gib: float = H100,
    world: int = 1,
    seconds: float = 900,
    find_waits: bool = False,
    allocator: str = "expandable_segments:False",
) -> Report:
    """Run a module's main in a process of its own that has a virtual GPU.

    Args:
        gib: memory of the card.
        world: processes of the run; this is rank 0, the others are imagined.
        seconds: after which the process is ended.
        find_waits: fill `Report.waiting`.
        allocator: PYTORCH_CUDA_ALLOC_CONF.
    """
    with tempfile.TemporaryDirectory() as folder:
        site = Path(__file__).with_name("site")
        env = os.environ | {
            "LD_PRELOAD": str(library()),
            "TRITON_LIBCUDA_PATH": str(library().parent),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"), os.getcwd()))),
            **dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), allocator),
            "VIRTUAL_GPU_GIB": str(gib),
            "VIRTUAL_GPU_REPORTS": folder,
            "VIRTUAL_GPU_WORLD": str(world),
            "VIRTUAL_GPU_WAITS": "1" if find_waits else "",
        }
        if world > 1:
            env |= {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(min(8, world))}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        counted = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return Report(
        done.returncode,
        done.stdout,
        *(_sum(part[name] for part in counted) for name in ("launches", "waiting")),
        max((part["most_used"] for part in counted), default=0),
    )


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(total)
