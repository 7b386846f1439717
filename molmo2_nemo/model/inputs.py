"""A micro-batch as the model takes it: the collator's arrays as tensors, plus what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.parallel.context import ContextGroups

TOKEN_FIELDS = ("input_ids", "example_ids", "branch_ids", "visual")  # what the mask follows from
HOST_FIELDS = (
    "pooled_positions",
    "unit_crops",
    "unit_pooled_tokens",
)  # read to plan communication: never moved to a device


@dataclass
class PackInputs:
    """B packs of S tokens with their crops. Field meanings and shapes are those of molmo2_nemo.data.example.Batch."""

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
    host: dict[str, Tensor] | None = None  # TOKEN_FIELDS as they came, where the others went to a device

    @classmethod
    def from_batch(cls, batch: Any, device: torch.device | str | int = "cpu") -> PackInputs:
        """From a numpy `Batch`; arrays go to `device`, except those that plan communication."""
        values: dict[str, Any] = {}
        for f in fields(cls):
            array = getattr(batch, f.name, None)
            if array is None:
                continue
            tensor = torch.as_tensor(array)
            values[f.name] = tensor if f.name in HOST_FIELDS else tensor.to(device, non_blocking=True)
        if torch.device(device).type != "cpu":
            values["host"] = {name: torch.as_tensor(getattr(batch, name)) for name in TOKEN_FIELDS}
        return cls(**values)

    def mask(self, first_extra_id: int, visual_attention: str) -> TokenMask:
        """Who may look at whom, with what plans it on the host: nothing waits for a device."""
        blocks = visual_blocks(self.input_ids, self.visual, first_extra_id)
        host = None
        if self.host is not None:
            host_blocks = visual_blocks(self.host["input_ids"], self.host["visual"], first_extra_id)
            host = np.stack((self.host["example_ids"], self.host["branch_ids"], host_blocks))
        return TokenMask(self.example_ids, self.branch_ids, blocks, visual_attention, host)


def visual_blocks(input_ids: Tensor, visual: Tensor, first_extra_id: int) -> Tensor:
    """Running number of the picture or frame each visual token belongs to; 0 for text.

    A new picture begins at <low_res_im_start> or <frame_start>, or at an <im_start> that does not directly follow the
    end of a low-resolution view (frames marked with <im_start> have their timestamp in between). Offsets are the order
    of the extra tokens: <im_start> 0, <im_end> 1, <low_res_im_start> 4, <frame_start> 7.

    Only `within_image` attention tells pictures apart. The released code counts the first two markers alone (and says
    that it assumes them), so under it a video whose frames carry <im_start> would be a single picture; no released
    model was trained that way.

    Args:
        input_ids: int64 [B, S].
        visual: bool [B, S].
        first_extra_id: V, the id of <im_start>.

    Returns:
        int64 [B, S].
    """
    extra = input_ids - first_extra_id
    after_end = torch.roll(extra, 1, dims=1) == 1
    after_end[:, 0] = False
    starts = (extra == 4) | (extra == 7) | ((extra == 0) & ~after_end)
    return starts.long().cumsum(1).clamp(min=1) * visual
