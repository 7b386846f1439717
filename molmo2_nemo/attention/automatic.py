"""What `model.attention=auto` takes, from names alone. No torch here: the planner asks too."""

from __future__ import annotations

FLOATS = ("float16", "bfloat16", "float32", "float64")


def flash_problem(device: str, dtype: str, head_size: int) -> str | None:
    """Why the `flash` kernel cannot run on such a device, or None.

    Args:
        device: cpu, cuda, ...
        dtype: torch's name of the type, such as bfloat16.
    """
    if device == "cpu":
        return None if dtype in FLOATS else f"PyTorch's CPU flash attention does not take torch.{dtype}"
    if device != "cuda":
        return f"PyTorch has no flash attention for {device}"
    if dtype not in ("float16", "bfloat16"):
        return f"flash attention on CUDA takes fp16 and bf16, not torch.{dtype} (cluster.precision=bf16)"
    if head_size > 256 or head_size % 8:
        return f"flash attention on CUDA takes head sizes that are multiples of 8 up to 256, not {head_size}"
    return None


def automatic(device: str, dtype: str, head_size: int) -> str:
    """The fastest kernel for a device ("cpu", "cuda"), a dtype by torch's name, and a head size."""
    return "flash" if flash_problem(device, dtype, head_size) is None else "blocks"
