"""What `molmo2 doctor` checks: each function checks one thing and yields findings. Only `devices` imports torch."""

from __future__ import annotations

import fcntl
import importlib
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Literal

from molmo2_nemo import compat
from molmo2_nemo.errors import UserError
from molmo2_nemo.launch.overlay import AGAIN, Overlay, find_overlay, origin_of

# What every run needs: package -> its use, and the command that installs it.
NEEDED = {
    "torch": ("the tensors and the processes", compat.PINS),
    "megatron-core": ("the parallel layers", compat.PINS),
    "nemo-toolkit": ("the trainer", compat.PINS),
    "lightning": ("the trainer", compat.PINS),
    "nemo_run": ("recipes and launchers", compat.PINS),
    "hydra-core": ("configuration", "pip install hydra-core==1.3.2"),
    "webdataset": ("shards", "pip install webdataset"),
    "pyarrow": ("manifests of shards", "pip install pyarrow"),
    "av": ("video decoding", "pip install av"),
    "pillow": ("image decoding", "pip install pillow"),
    "lhotse": ("subtitles", "pip install lhotse"),
    "tokenizers": ("text", "pip install tokenizers"),
    "safetensors": ("weights", "pip install safetensors"),
    "rich": ("tables", "pip install rich"),
}
OPTIONAL = {
    "nvidia-modelopt": "llm.import_ckpt and llm.export_ckpt of NeMo",
    "tensorboard": "reading the event files",
    "matplotlib": "the curves of molmo2 demo and molmo2 report",
    "wandb": "logging to Weights & Biases",
    "mlflow": "logging to MLflow",
    "s3fs": "shards at s3:// (molmo2_nemo[s3])",
    "gcsfs": "shards at gs:// (molmo2_nemo[gcs])",
    "torchcodec": "data.video.decoder=torchcodec and nvdec",
}
GPU_PACKAGES = {  # module, use; distributions differ in name from builder to builder
    "transformer-engine": ("transformer_engine.pytorch", "fused layers"),
    "FlashAttention-3": ("flash_attn_interface", "attention on Hopper"),
    "FlashAttention-4": ("flash_attn.cute", "attention on Hopper and Blackwell"),
    "apex": ("apex", "fused optimizer"),
}
SHARED_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "virtiofs", "9p", "pvfs2", "cifs")
CODECS = ("h264", "hevc", "vp9", "av1")
IMAGE_FORMATS = ("jpg", "webp", "zlib")  # zlib is PNG's
TORCHRUN_PORT = 29500


Level = Literal["ok", "note", "missing"]


@dataclass
class Finding:
    """One line of the report. missing: no run can start here; note: some runs cannot, or will be slow."""

    level: Level
    name: str
    seen: str
    fix: str = ""


def version_of(name: str) -> str | None:
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return None


def python() -> Iterator[Finding]:
    seen = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    first, last = compat.PYTHON
    if first <= sys.version_info[:2] <= last:
        yield Finding("ok", "python", seen)
    else:
        tried = " to ".join(".".join(map(str, v)) for v in compat.PYTHON)
        yield Finding("missing", "python", f"{seen}: was not tried, only {tried}", "make venv PYTHON=python3.12")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    low = total < 6
    fix = "the tiny recipe takes about 2 GiB per process; use parallel=single" if low else ""
    yield Finding("note" if low else "ok", "memory", f"{total:.0f} GiB", fix)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 < files < 4096
    yield Finding("note" if few else "ok", "open files", f"{files} per process", "ulimit -n 65536" if few else "")


def stack() -> Iterator[Finding]:
    """The libraries that will run, where each comes from, and whether it was tried (compat.TRIED)."""
    overlay = None
    try:
        overlay = find_overlay()
        if overlay is not None:
            yield _overlay(overlay)
    except UserError as error:
        yield Finding("missing", "overlay", str(error).removesuffix(f"; {AGAIN}"), AGAIN)
    for name in (*compat.TRIED, "transformer-engine"):
        found = version_of(name)
        if found is None:
            if name not in NEEDED:
                yield Finding("ok", name, "-")
            continue
        origin = f"{origin_of(name):<12} " if overlay is not None else ""
        yield _tried(name, f"{found:<14} {origin}", found)


def _tried(name: str, seen: str, found: str) -> Finding:
    """What is there, as it is shown, against what was tried."""
    tried = compat.TRIED.get(name)
    if tried is None:
        return Finding("ok", name, f"{seen}used where it is there")
    versions = ", ".join(tried.versions)
    if not compat.fits(found, tried.accepted):
        level: Level = "note" if os.environ.get(compat.UNTRIED) == "1" else "missing"
        return Finding(level, name, f"{seen}was not tried, only {versions}: {tried.why}", tried.get)
    same = any(compat.fits(found, f"=={version}") for version in tried.versions)
    return Finding("ok", name, f"{seen}tried" if same else f"{seen}accepted; tried: {versions}")


def _overlay(overlay: Overlay) -> Finding:
    """Packages compiled for the environment's own lie in it: it must be what it was."""
    moved = [
        f"{name} {was} (now {version_of(name)})" for name, was in overlay.beside.items() if version_of(name) != was
    ]
    if not moved:
        return Finding("ok", "overlay", f"{overlay.site}")
    return Finding("note", "overlay", f"{overlay.site} was made beside {', '.join(moved)}", AGAIN)


def packages() -> Iterator[Finding]:
    """What a run needs beside the stack; and what is not there at all."""
    for name, (use, fix) in NEEDED.items():
        found = version_of(name)
        if found is None:
            yield Finding("missing", name, f"not installed; for {use}", fix)
        elif name not in compat.TRIED:
            yield Finding("ok", name, f"{found:<14} {use}")


def optional_packages() -> Iterator[Finding]:
    for name, use in OPTIONAL.items():
        yield Finding("ok", name, f"{version_of(name) or '-':<14} {use}")


def media() -> Iterator[Finding]:
    """Whether the decoders can read what data sets hold."""
    try:
        import av
        from PIL import features
    except ImportError as error:
        yield Finding("missing", "decoders", str(error), "pip install av pillow")
        return
    absent = [c for c in CODECS if c not in av.codecs_available]
    seen = ", ".join(c for c in CODECS if c not in absent)
    fix = (
        f"no {', '.join(absent)}: install PyAV's own wheel (pip install --force-reinstall --no-deps av)"
        if absent
        else ""
    )
    yield Finding("note" if absent else "ok", "video codecs", seen, fix)
    lacking = [f for f in IMAGE_FORMATS if not features.check(f)]
    fix = f"no {', '.join(lacking)}: pip install --force-reinstall --no-deps pillow" if lacking else ""
    yield Finding("missing" if lacking else "ok", "image formats", "JPEG, PNG, WebP" if not lacking else "", fix)


def devices() -> Iterator[Finding]:
    """What torch can run on, and whether its processes can talk."""
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a broken torch can fail in any way
        yield Finding("missing", "torch", f"does not import: {error}", "docs/install.md says which build to install")
        return
    if not dist.is_available() or not dist.is_gloo_available():
        yield Finding("missing", "gloo", "not in this torch", "several CPU processes need it: install another build")
    else:
        yield Finding("ok", "gloo", "for CPU processes and checkpoints")
    if not torch.cuda.is_available():
        yield from _no_gpu(torch)
        return
    names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**30
    seen = f"{torch.cuda.device_count()} x {', '.join(names)}, {memory:.0f} GiB each"
    yield Finding("ok", "GPUs", f"{seen}, CUDA {torch.version.cuda}, driver {_driver() or 'unknown'}")
    if not torch.cuda.is_bf16_supported():
        fix = "cluster.precision=fp32; the big recipes need Ampere or newer"
        yield Finding("note", "bfloat16", "not on this GPU", fix)
    if dist.is_nccl_available():
        yield Finding("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("missing", "NCCL", "not in this torch", "GPU processes need it: install a CUDA build")
    yield from _gpu_packages()


def _no_gpu(torch: Any) -> Iterator[Finding]:
    driver = _driver()
    if driver is None:
        yield Finding("ok", "GPUs", "none; runs use the CPU with gloo")
    elif torch.version.cuda is None:
        fix = "this torch is a CPU build: install a CUDA build, or run in the NGC NeMo container"
        yield Finding("note", "GPUs", f"driver {driver}, but torch cannot use it", fix)
    else:
        fix = f"torch needs CUDA {torch.version.cuda}: update the driver, or start the container with --gpus all"
        yield Finding("note", "GPUs", f"driver {driver}, but CUDA does not start", fix)


def _gpu_packages() -> Iterator[Finding]:
    """Libraries that only GPUs use. They are compiled against one torch: having one is not enough, it must import."""
    owners = packages_distributions()
    for name, (module, use) in GPU_PACKAGES.items():
        problem = _import_problem(module)
        if problem == "absent":
            yield Finding("ok", name, f"-              {use}; optional, slower without")
            continue
        top = module.partition(".")[0]
        found = ", ".join(f"{owner} {version_of(owner)}" for owner in sorted(set(owners.get(top, [])))) or top
        if problem is None:
            yield Finding("ok", name, f"{found:<14} {use}")
        else:
            fix = f"built for another torch: use both from one NGC image, or pip uninstall {found.split()[0]}"
            yield Finding("note", name, f"{found} does not import: {problem}", fix)


def _import_problem(module: str) -> str | None:
    """Why a module does not import, "absent" where it is not there, None where it does."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "absent" if error.name and f"{module}.".startswith(f"{error.name}.") else str(error)
    except Exception as error:  # a library of another torch fails in any way it likes
        return str(error).splitlines()[0] if str(error) else repr(error)
    return None


def _driver() -> str | None:
    """Version of NVIDIA's driver, None without one."""
    path = Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return None
    found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", path.read_text())
    return found[1] if found else "unknown"


def slurm() -> Iterator[Finding]:
    """Slurm and its container plugin, if this is a login node."""
    fix = "cluster=slurm needs a login node: run molmo2 on one, or set cluster.slurm.ssh.host"
    if shutil.which("sbatch") is None:
        yield Finding("ok", "slurm", "not installed", fix)
        return
    answer = _run("scontrol", "ping")
    if answer.returncode or "is UP" not in answer.stdout:
        why = (answer.stderr or answer.stdout).strip().splitlines()
        yield Finding("note", "slurm", f"sbatch is installed, but no controller answers: {why[-1] if why else ''}", fix)
        return
    yield Finding("ok", "slurm", f"{_run('sinfo', '--version').stdout.strip()}, the controller answers")
    if "--container-image" in _run("srun", "--help").stdout:
        yield Finding("ok", "pyxis", "srun takes --container-image")
    else:
        yield Finding("ok", "pyxis", "not installed", "jobs run in molmo2's own environment, not in containers")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that may be missing or hang."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def storage(folder: Path) -> Iterator[Finding]:
    """Whether checkpoints can be written to `folder` (or the nearest one above that exists), and who else sees it."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    fix = "make room: the tiny recipe alone takes 1 GiB" if free < 5 else ""
    yield Finding("note" if free < 5 else "ok", "disk", f"{free:.0f} GiB free in {folder}", fix)
    kind = file_system(folder)
    shared = kind in SHARED_SYSTEMS or kind.startswith("fuse.")
    who = "other nodes can see it" if shared else "local to this machine: several nodes need a shared one"
    yield Finding("ok", "file system", f"{kind}, {who}")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".molmo2-") as name:
            part = Path(name) / "part"
            with part.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.rename(Path(name) / "whole")
    except PermissionError:
        yield Finding("note", "writing", f"not allowed in {folder}", "choose another output_dir; --dir checks it")
    except OSError as error:
        fix = "two runs in one folder would not notice each other (mount with locks: -o flock or local_lock=none)"
        yield Finding("note", "locks", f"not in {folder}: {error}", fix)
    shm = Path("/dev/shm")
    if shm.is_dir():
        size = shutil.disk_usage(shm).total / 2**30
        fix = "loader workers pass batches through it: start the container with --shm-size=16g or --ipc=host"
        yield Finding("note" if size < 1 else "ok", "/dev/shm", f"{size:.1f} GiB", fix if size < 1 else "")


def file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, such as ext4, lustre or nfs4; "unknown" where /proc is not."""
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return kind
    target = str(folder.resolve())
    for line in lines:
        _, point, type_ = line.split(" ")[:3]
        point = point.replace("\\040", " ")
        if (target == point or target.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, type_
    return kind


def network() -> Iterator[Finding]:
    """Whether processes can find each other: a port on the loopback, the machine's own name, torchrun's usual port."""
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
    except OSError as error:
        yield Finding(
            "missing",
            "ports",
            f"none can be opened on 127.0.0.1: {error}",
            "processes need them to find each other: allow it",
        )
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        yield Finding("ok", "host name", f"{name} is {address}")
    except OSError:
        fix = f"several nodes need it: add '127.0.0.1 {name}' to /etc/hosts, or set MASTER_ADDR"
        yield Finding("note", "host name", f"{name} has no address", fix)
    with socket.socket() as s:
        taken = s.connect_ex(("127.0.0.1", TORCHRUN_PORT)) == 0
    fix = "something listens there: give torchrun another --master-port (molmo2 picks a free one itself)"
    seen = f"{TORCHRUN_PORT} is {'taken' if taken else 'free'} (torchrun's default)"
    yield Finding("note" if taken else "ok", "port", seen, fix if taken else "")
