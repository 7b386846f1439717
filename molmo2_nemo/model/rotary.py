"""Rotary tables, indexed by position ids: plain (or interpolated), and another for layers with scaling of their own.

A table is asked for the positions of this rank's tokens only, so it is right for packed, branched and sharded
sequences alike. Frequencies and angles are fp32, as published.

Shape legend: B packs, T tokens of this rank, H head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from molmo2_nemo.model.families.base import TextConfig, YarnConfig


def inverse_frequencies(text: TextConfig) -> Tensor:
    """Plain rotary: base^(-2j / H) for j < H / 2, fp32 [H / 2], over `rotary_scale` where it is every layer's."""
    exponent = torch.arange(0, text.head_dim, 2, dtype=torch.int64).float() / text.head_dim
    return 1.0 / (text.rotary_base**exponent) / (text.rotary_scale if text.rotary_scale_layers is None else 1.0)


def yarn_inverse_frequencies(text: TextConfig, yarn: YarnConfig) -> Tensor:
    """YaRN (arXiv 2309.00071): high frequencies kept, low ones divided by `factor`, a linear ramp between.

    The ramp's ends are the dimensions that turn beta_fast and beta_slow times over the original context, rounded
    outwards (Olmo 3: 18 and 35 of 64).
    """

    def dimension(turns: float) -> float:
        wave = yarn.original_max_position / (turns * 2 * math.pi)
        return text.head_dim * math.log(wave) / (2 * math.log(text.rotary_base))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), text.head_dim - 1)
    index = torch.arange(text.head_dim // 2, dtype=torch.float32)
    ramp = ((index - low) / ((high - low) or 1e-3)).clamp(0, 1)
    plain = inverse_frequencies(text)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


class RotaryTables:
    """The tables of a model. Frequencies are computed on the host and kept on the device that first asks."""

    def __init__(self, text: TextConfig) -> None:
        self.text = text
        self._inverse: dict[torch.device, dict[str, tuple[Tensor, float]]] = {}

    def use(self, text: TextConfig) -> None:
        """Take the rotary of another configuration, with tables of the same names, from now on."""
        if text != self.text:
            self.text, self._inverse = text, {}

    def tables(self, position_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """cos and sin for every table the model uses.

        Args:
            position_ids: int64 [B, T].

        Returns:
            table name ("plain", "linear", "yarn") -> (cos, sin), each fp32 [T, B, 1, H].
        """
        device = position_ids.device
        if device not in self._inverse:
            self._inverse[device] = {n: (i.to(device), factor) for n, (i, factor) in _frequencies(self.text).items()}
        return {n: _table(inverse, position_ids, factor) for n, (inverse, factor) in self._inverse[device].items()}


def rotary_tables(text: TextConfig, position_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """`RotaryTables.tables` of a model, once."""
    return RotaryTables(text).tables(position_ids)


def _frequencies(text: TextConfig) -> dict[str, tuple[Tensor, float]]:
    """Table name -> inverse frequencies fp32 [H / 2] on the host, and the factor on its cos and sin."""
    found = {"plain": (inverse_frequencies(text), 1.0)}
    if text.rotary_scale_layers is not None:
        found["linear"] = inverse_frequencies(text) / text.rotary_scale, 1.0
    if text.yarn is not None:
        found["yarn"] = yarn_inverse_frequencies(text, text.yarn), text.yarn.attention_factor
    return found


def _table(inverse: Tensor, position_ids: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    angles = position_ids.T.float()[..., None] * inverse  # [T, B, H / 2]
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]
    return angles.cos() * factor, angles.sin() * factor


def table_of_layer(text: TextConfig) -> dict[int, str]:
    """0-based layer -> name of its table; layers left out use "plain"."""
    linear = dict.fromkeys(text.rotary_scale_layers or (), "linear")
    return linear | dict.fromkeys(text.yarn.layers if text.yarn else (), "yarn")
