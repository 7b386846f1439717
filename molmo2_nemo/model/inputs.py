"""A micro-batch as the model takes it: the collator's arrays as tensors, plus what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.ring import VisibleKeys
from molmo2_nemo.data.special_tokens import image_numbers
from molmo2_nemo.features.frozen import Found
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.model.flops import unit_costs
from molmo2_nemo.parallel.context import ContextGroups
from molmo2_nemo.parallel.crops import CropPlan, VisionUnits
from molmo2_nemo.transfer import to_device

# What plans follow from: the mask, the crops, the scored positions
PLANNED_FIELDS = ("input_ids", "example_ids", "branch_ids", "visual", "labels", "loss_weights")
HOST_FIELDS = (
    "pooled_positions",
    "unit_crops",
    "unit_pooled_tokens",
)  # read to plan communication: never moved to a device


VISION_FIELDS = ("crops", "pooling")  # the largest, of which a rank needs its own part only


class VisualTokens(Protocol):
    """Visual tokens that may have been encoded before. Crops are of one pack then, in every call."""

    def of(self, crops: slice, windows: Tensor, encode: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """Visual tokens [N, D] of consecutive crops and their windows [N, K]: those of `encode`, now or earlier."""
        ...


@dataclass(frozen=True)
class PackPlan:
    """What one rank's part of the model does with a micro-batch: found on the host, its indices on the device."""

    mask: TokenMask
    visible: VisibleKeys | None  # what context ranks may see of each other, where they show each other keys
    crops: CropPlan | None  # on the first pipeline stage
    scored: Tensor | None  # int64 [n], this rank's positions with a loss in [T * B]; on the last stage, with labels


@dataclass
class PackInputs:
    """B packs of S tokens with their crops. Field meanings and shapes are those of molmo2_nemo.data.example.Batch.

    Context ranks hold consecutive parts of the token arrays. These may be in another order than the pack's
    (attention/balance.py): its own is that of the mask.
    """

    input_ids: Tensor  # int64 [B, S], -1 where padded
    position_ids: Tensor  # int64 [B, S]
    example_ids: Tensor  # int64 [B, S], -1 where padded
    branch_ids: Tensor  # int64 [B, S], -1 in the root
    visual: Tensor  # bool [B, S]
    crops: Tensor  # uint8 [C, P, D_p]
    pooling: Tensor  # int64 [N, K]
    pooled_positions: Tensor  # int64 [N], host
    unit_crops: Tensor  # int64 [U], host
    unit_pooled_tokens: Tensor  # int64 [U], host
    labels: Tensor | None = None  # int64 [B, S]; None for inference
    loss_weights: Tensor | None = None  # fp32 [B, S]
    tasks: Tensor | None = None  # int64 [B, S], number of the task group each token belongs to; for the log
    num_tasks: int = 0
    groups: ContextGroups | None = None  # the ranks that share it; None: all of the context group
    host: dict[str, np.ndarray] | None = None  # PLANNED_FIELDS as they came, where the tensors went to a device
    features: Found | None = None  # of a frozen encoder, for this rank's crops; None: not looked up (yet)
    plan: PackPlan | None = None  # made ahead (Molmo2Model.plan); None: made when it is needed
    encoded: VisualTokens | None = None  # keeps visual tokens of packs that come again; None: nothing is kept
    in_pack_order: TokenMask | None = None  # the mask, where the tokens are in another order; None: made of them

    @classmethod
    def from_batch(
        cls, batch: Any, device: torch.device | str | int = "cpu", *, vision_later: bool = False
    ) -> PackInputs:
        """From a numpy `Batch`; arrays go to `device`, except those that plan communication.

        Args:
            vision_later: crops and windows stay on the host too, until `keep_own_crops` moves this rank's.
        """
        values: dict[str, Any] = {}
        stay = (*HOST_FIELDS, *VISION_FIELDS) if vision_later else HOST_FIELDS
        for f in fields(cls):
            array = getattr(batch, f.name, None)
            if array is not None:
                values[f.name] = torch.as_tensor(array) if f.name in stay else to_device(array, device)
        if torch.device(device).type != "cpu":
            values["host"] = {name: np.asarray(getattr(batch, name)) for name in PLANNED_FIELDS}
        return cls(**values)

    def keep_own_crops(self, plan: CropPlan | None, patches: int) -> None:
        """Bring to the device what this rank encodes and pools, and let go of the rest.

        Args:
            plan: counted from the first crop; None: this rank encodes nothing.
            patches: of a crop.
        """
        first, crops, pooled = (plan.crops.start, plan.crops, plan.pooled_tokens) if plan else (0, slice(0), slice(0))
        windows = self.pooling[pooled]
        windows = torch.where(windows >= 0, windows - first * patches, windows)
        self.crops = to_device(self.crops[crops], self.input_ids.device)
        self.pooling = to_device(windows, self.input_ids.device)

    def on_host(self, name: str) -> np.ndarray:
        """One of PLANNED_FIELDS as an array. Where only the device has it, the host waits for that."""
        return getattr(self, name).cpu().numpy() if self.host is None else self.host[name]

    def mask(self, vocab_size: int, visual_attention: str) -> TokenMask:
        """Who may look at whom, with what plans it on the host: nothing waits for a device."""
        if self.in_pack_order is not None:
            return self.in_pack_order
        if self.host is None:
            blocks = image_numbers(self.input_ids, self.visual, vocab_size)
            return TokenMask(self.example_ids, self.branch_ids, blocks, visual_attention)
        numbers = image_numbers(self.host["input_ids"], self.host["visual"], vocab_size)
        host = np.stack((self.host["example_ids"], self.host["branch_ids"], numbers))
        blocks = to_device(numbers, self.example_ids.device)
        return TokenMask(self.example_ids, self.branch_ids, blocks, visual_attention, host)

    def scored(self, groups: ContextGroups) -> np.ndarray:
        """This rank's positions with a loss, int64 [n], ascending in its flattened [T, B] tokens."""
        return np.flatnonzero(groups.shard(self.on_host("loss_weights")).T)

    def vision_units(self, model_config: Molmo2Config) -> VisionUnits:
        """The micro-batch's vision units: what is encoded and pooled, and what each unit costs."""
        packs, size = self.input_ids.shape
        costs = unit_costs(model_config, self.unit_crops.numpy(), self.unit_pooled_tokens.numpy())
        return VisionUnits(self.unit_crops, self.unit_pooled_tokens, costs, self.pooled_positions, packs, size)
