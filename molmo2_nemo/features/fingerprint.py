"""What an encoder's features follow from, besides the pixels of a crop."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch
from torch import nn

VERSION = 1  # one more whenever the encoder's arithmetic changes


def fingerprint(encoder: nn.Module, *settings: object) -> str:
    """SHA-256, as hex, of the parameters with their names and types, of `settings`, and of what rounds here: device,
    processor, threads and library. Another machine's features may differ by rounding, so they are others."""
    digest = hashlib.sha256(repr((VERSION, settings, rounding())).encode())
    for name, parameter in encoder.named_parameters():
        digest.update(repr((name, tuple(parameter.shape), str(parameter.dtype))).encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rounding() -> tuple[object, ...]:
    """What decides which kernels compute, and so how they round."""
    common = (torch.__version__, torch.get_float32_matmul_precision())
    if torch.cuda.is_available():
        matmul = torch.backends.cuda.matmul
        reduced = (matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction)
        return *common, torch.version.cuda, torch.cuda.get_device_name(), *reduced
    return *common, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), processor()


def processor() -> str:
    """What this machine calls its processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
