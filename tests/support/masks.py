"""Packs of every shape that training sees, as mask data without tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from molmo2_nemo.attention.mask import TokenMask

RULES = ("image_tokens", "within_image", "none")


@dataclass(frozen=True)
class Tree:
    """One example: text and pictures in turns in the root, then branches. A plain example has no branches."""

    text: tuple[int, ...] = (5,)  # tokens of text before each picture, and after the last
    pictures: tuple[int, ...] = ()  # visual tokens of each picture or frame
    branches: tuple[int, ...] = ()  # tokens of each branch
    pictures_in_branches: bool = False  # the rule allows it, whatever the data pipeline does

    def arrays(self, number: int, first_picture: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Example id, branch id and visual block of every token."""
        runs = []  # (tokens, branch, block)
        for i, words in enumerate(self.text):
            runs.append((words, -1, 0))
            if i < len(self.pictures):
                runs.append((self.pictures[i], -1, first_picture + i))
        for branch, length in enumerate(self.branches):
            seen = length // 2 if self.pictures_in_branches else 0
            runs += [(seen, branch, first_picture + len(self.pictures) + branch), (length - seen, branch, 0)]
        lengths = [length for length, *_ in runs]
        branch_ids = np.repeat([branch for _, branch, _ in runs], lengths)
        return np.full(sum(lengths), number), branch_ids, np.repeat([block for *_, block in runs], lengths)


def pack(trees: list[Tree], size: int | None = None) -> np.ndarray:
    """The trees one after another, cut or padded to `size` tokens; int64 [3, S]: example, branch, visual block."""
    rows, picture = [np.zeros((3, 0), np.int64)], 1
    for number, tree in enumerate(trees):
        rows.append(np.stack(tree.arrays(number, picture)))
        picture += len(tree.pictures) + len(tree.branches)
    joined = np.concatenate(rows, axis=1)[:, :size]
    padding = np.array([-1, -1, 0])[:, None].repeat((size or joined.shape[1]) - joined.shape[1], axis=1)
    return np.concatenate((joined, padding), axis=1).astype(np.int64)


def token_mask(packs: list[list[Tree]], size: int | None = None, rule: str = "image_tokens") -> TokenMask:
    """A micro-batch; without `size` as long as the longest pack."""
    size = size or max(pack(trees).shape[1] for trees in packs)
    described = np.stack([pack(trees, size) for trees in packs], axis=1)
    return TokenMask(*torch.from_numpy(described).unbind(), rule)
