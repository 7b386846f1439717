"""Who may look at whom, defined once.

A pack is described by a few integers per token, never by a matrix. `may_attend` is the whole rule (Molmo2's paper, on
message trees):

    same example
    and (the key is in the root, or key and query are in one branch)
    and (the key is not later than the query, or both are visual tokens)

Whatever else knows something of the mask is tested against it: the segments that kernels work on (regions.py), the
keys that ranks show each other (ring.py), the number of allowed pairs (data/counts.py).

Shape legend: B packs, S tokens; Q and K are any slices of S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo.data.example import ROOT_BRANCH


@dataclass
class TokenMask:
    """Per-token description of a micro-batch, enough to evaluate `may_attend` anywhere.

    Padding is an example of its own (id -1): it attends to itself, so no softmax row is empty, and nobody else sees it.
    """

    example_ids: Tensor  # int64 [B, S]
    branch_ids: Tensor  # int64 [B, S], ROOT_BRANCH in the root
    visual_block: Tensor  # int64 [B, S], 0 for text, else the running number of the image or frame
    visual_attention: str = "image_tokens"  # or "within_image", "none"
    # The same three as numpy int64 [3, B, S], where the caller has them: kernels plan their work from these. Without
    # them they are copied from the tensors once, which makes the host wait for an accelerator.
    host: np.ndarray | None = field(default=None, repr=False)
    # Places of the S tokens in the order in which ranks that show each other keys hold them, int64 [S]: each rank has
    # an equal part, ascending within (balance.py). None: consecutive runs.
    order: np.ndarray | None = field(default=None, repr=False)
    regions: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # made by regions.region_of

    def on_host(self) -> np.ndarray:
        """Example ids, branch ids and visual blocks as numpy int64 [3, B, S]."""
        if self.host is None:
            described = torch.stack((self.example_ids, self.branch_ids, self.visual_block))
            self.host = described.cpu().numpy()
        return self.host

    @property
    def size(self) -> int:
        return self.example_ids.shape[1]

    def rows(self, start: int, stop: int, key_start: int = 0, key_stop: int | None = None) -> Tensor:
        """The mask of queries start..stop over keys key_start..key_stop, bool [B, Q, K]; True where allowed."""
        key_stop = self.size if key_stop is None else key_stop
        index = torch.arange(self.size, device=self.example_ids.device)
        described = torch.stack((self.example_ids, self.branch_ids, self.visual_block))
        q = described[:, :, start:stop, None].unbind()
        k = described[:, :, None, key_start:key_stop].unbind()
        return may_attend(q, k, index[start:stop, None], index[None, key_start:key_stop], self.visual_attention)


def may_attend(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    q_index: Tensor,
    k_index: Tensor,
    visual_attention: str = "image_tokens",
) -> Tensor:
    """The mask rule on broadcastable token descriptions.

    Args:
        q, k: (example id, branch id, visual block) of queries and keys.
        q_index, k_index: their places in the pack.
        visual_attention: "image_tokens" (every visual token of an example sees every other), "within_image" (only keys
            of the same or an earlier image), or "none" (plain causal).

    Returns:
        bool, broadcast shape; True where the query may look at the key.
    """
    q_example, q_branch, q_block = q
    k_example, k_branch, k_block = k
    visible = k_index <= q_index
    if visual_attention != "none":
        both = (q_block > 0) & (k_block > 0)
        if visual_attention == "within_image":
            both = both & (k_block <= q_block)
        visible = visible | both
    return (q_example == k_example) & ((k_branch == ROOT_BRANCH) | (k_branch == q_branch)) & visible
