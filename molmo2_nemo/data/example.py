"""The two values that flow through `data/`: an `Example` (one record, tokenised) and a `Batch` (packs of examples).

Shape legend: T tokens of one example, S tokens of a pack with its padding, C crops, P patches per crop, D_p values per
patch, N pooled tokens, K patches in a full pooling window, U indivisible vision units, B packs in a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

ROOT_BRANCH = -1  # branch id of tokens that every branch of their example may see (and of plain examples)
PAD_EXAMPLE = -1  # example id of padding
PAD_TOKEN = -1  # input id and label of padding; never a row of the embedding table


class Run(NamedTuple):
    """Consecutive tokens of a pack that are from one record."""

    key: str  # of the record; empty where an earlier run has it
    source: str  # the data set
    tokens: int


@dataclass(slots=True)
class Example:
    """One record as the model will see it: a message tree flattened into shifted token arrays, and its crops."""

    input_ids: np.ndarray  # int64 [T]
    labels: np.ndarray  # int64 [T], already shifted: labels[t] is what follows input_ids[t]
    loss_weights: np.ndarray  # float32 [T], 0 where a token has no loss
    position_ids: np.ndarray  # int64 [T]; every branch restarts where the root ends
    branch_ids: np.ndarray  # int64 [T]; ROOT_BRANCH, or the branch's number
    visual: np.ndarray  # bool [T]; image and frame tokens, which attend to each other in both directions
    crops: np.ndarray  # uint8 [C, P, D_p], or [0, P, D_p] as long as they are not decoded
    pooling: np.ndarray  # int64 [N, K]; patch index crop*P + patch, -1 past a small window; n feeds the n-th <im_patch>
    unit_crops: np.ndarray  # int64 [U]; crops per indivisible unit (an image with its tiles, or one video frame)
    unit_pooled_tokens: np.ndarray  # int64 [U]; pooled tokens per unit
    key: str = ""  # "shard-name:record-key", for messages
    source: str = ""  # the data set, as data.sources names it
    chunks: list[int] = field(default_factory=list)  # tokens of each chunk, where it was cut (joining.py)
    runs: list[Run] = field(default_factory=list)  # where it was joined of several
    info: dict[str, Any] = field(default_factory=dict)  # details for the preview: frame times, texts, tilings

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_crops(self) -> int:
        return int(self.unit_crops.sum())

    @property
    def parts(self) -> list[Run]:
        """Whose tokens it holds, in their order."""
        return self.runs or [Run(self.key, self.source, self.num_tokens)]

    def make_room(self) -> None:
        """Give the example, planned without crops, room for them: not filled yet."""
        self.crops = np.empty((self.num_crops, *self.crops.shape[1:]), np.uint8)


@dataclass(slots=True)
class Batch:
    """A micro-batch of packs, as numpy arrays. Token arrays are padded to S; crops are never padded."""

    input_ids: np.ndarray  # int64 [B, S], PAD_TOKEN where padded
    labels: np.ndarray  # int64 [B, S], PAD_TOKEN where padded
    loss_weights: np.ndarray  # float32 [B, S], 0 where padded
    position_ids: np.ndarray  # int64 [B, S], 0 where padded
    example_ids: np.ndarray  # int64 [B, S], 0.. within a pack, PAD_EXAMPLE where padded
    branch_ids: np.ndarray  # int64 [B, S]
    visual: np.ndarray  # bool [B, S]
    crops: np.ndarray  # uint8 [C, P, D_p], all packs' crops in order
    pooling: np.ndarray  # int64 [N, K], patch indices into the flattened [C * P] axis
    pooled_positions: np.ndarray  # int64 [N], flattened b * S + s of the <im_patch> that pooled token n joins
    unit_crops: np.ndarray  # int64 [U]
    unit_pooled_tokens: np.ndarray  # int64 [U]
    keys: list[list[str]] = field(default_factory=list)  # per pack, the keys of its examples
    sources: list[list[str]] = field(default_factory=list)  # per pack, the data set of each run of its tokens
    source_tokens: list[list[int]] = field(default_factory=list)  # per pack, the tokens of each of these runs
    state: dict[str, Any] = field(default_factory=dict)  # loader state after this batch (JSON values only)
    context_ranks: int = 0  # ranks that share the batch under dynamic context parallelism; 0: the whole context group
    of_step: int = 0  # micro-batches of its step on this rank, where they are assigned step by step; 0: not said
