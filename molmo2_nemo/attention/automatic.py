"""What `model.attention=auto` takes, from words alone. No torch: the planner asks too."""

from __future__ import annotations

FLOATS = ("float16", "bfloat16", "float32", "float64")


def flash_problem(device: str, dtype: str, head_size: int) -> str | None:
    """Why `flash` cannot run there, or None.

    Args:
        device: cpu, cuda, ...
        dtype: torch's name of it, such as bfloat16.
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
    """The fastest kernel that works there; arguments as `flash_problem`."""
    return "flash" if flash_problem(device, dtype, head_size) is None else "blocks"
