"""FP8 products in the decoder: Megatron's settings, and whether this process can take them.

Only Transformer Engine's modules multiply in FP8, and of this model only the decoder's linear layers are such
(model/decoder.py): vision encoder, connector, embedding, head and adapters have none, so they stay in bf16 whatever is
set. Megatron enters Transformer Engine's FP8 context around each decoder layer.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from molmo2_nemo import compat
from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.run import Precision

# Fields of TransformerConfig, the same in Megatron-core 0.16 to 0.19, and of NeMo's MegatronMixedPrecision. "hybrid":
# E4M3 forward, E5M2 for gradients. "tensorwise": current scaling. Parameters stay in bf16 (no fp8_param).
FP8: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
CURRENT_SCALING = "2.2"  # first Transformer Engine that has it
HOPPER = (9, 0)


def check_precision(precision: Precision) -> None:
    """Refuse a precision that this machine does not have; before anything is loaded.

    Raises:
        UserError: FP8 without Transformer Engine, or on another device than a Hopper or newer GPU.
    """
    if precision == "fp8" and (problem := fp8_problem()) is not None:
        raise UserError(f"cluster.precision=fp8: {problem}; use cluster.precision=bf16")


def fp8_problem() -> str | None:
    """Why this process cannot multiply in FP8; None where it can."""
    if not torch.cuda.is_available():
        return "needs a Hopper GPU (H100) or a newer one, and there is no GPU here"
    if (seen := torch.cuda.get_device_capability()) < HOPPER:
        name = torch.cuda.get_device_name()
        return f"needs a Hopper GPU (H100) or a newer one; {name} has compute capability {seen[0]}.{seen[1]}, not 9.0"
    if importlib.util.find_spec("transformer_engine") is None:
        return "needs Transformer Engine, which is not installed (NGC images have it)"
    found = compat.installed("transformer-engine")
    if found is not None and not compat.fits(found, f">={CURRENT_SCALING}"):
        return f"needs Transformer Engine {CURRENT_SCALING} for current scaling, {found} is installed"
    return None
