"""Packs of the shapes that training sees, as the data of their masks: no tokens, no pictures.

The mixed packs are drawn, not recorded: the published stage 2 packs 3.8 examples into 16,348 tokens on average (paper,
section on packing), and token counts of pictures and frames are those of the published preprocessing (a picture 410 to
1,189 tokens, a frame 83 with its start and end, and its timestamp).
"""

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


def token_mask(
    packs: list[list[Tree]], size: int | None = None, rule: str = "image_tokens", device: str = "cpu"
) -> TokenMask:
    """A micro-batch; without `size` as long as the longest pack."""
    size = size or max(pack(trees).shape[1] for trees in packs)
    described = np.stack([pack(trees, size) for trees in packs], axis=1)
    return TokenMask(*torch.from_numpy(described).to(device).unbind(), rule, host=described)


FRAME = 83  # 81 pooled patches, start and end
STILLS = (410, 752, 1189)  # a picture of 1, 4 and 8 tiles
TIMESTAMP = 5  # text tokens before each frame


def video(frames: int, branches: tuple[int, ...], frame: int = FRAME) -> Tree:
    """One video and the conversations about it; a single conversation belongs to the root."""
    after = branches if len(branches) == 1 else (0,)
    text = (1 + TIMESTAMP, *[TIMESTAMP] * (frames - 1), *after)
    return Tree(text, (frame,) * frames, branches if len(branches) > 1 else ())


def sft_example(rng: np.random.Generator, frame: int = FRAME, stills: tuple[int, ...] = STILLS) -> Tree:
    """One example of the shape of stage 2: text, a picture with many questions, several pictures, or a video."""

    def conversations(most: int, shortest: int, longest: int) -> tuple[int, ...]:
        return tuple(int(n) for n in rng.integers(shortest, longest, rng.integers(1, most + 1)))

    kind = rng.choice(["text", "picture", "pictures", "video"], p=[0.1, 0.4, 0.1, 0.4])
    if kind == "text":
        return Tree((int(rng.integers(200, 1500)),))
    if kind == "video":
        return video(int(rng.integers(24, 129)), conversations(5, 40, 400), frame)
    count = 1 if kind == "picture" else int(rng.integers(2, 6))
    sizes = tuple(int(n) for n in rng.choice(stills, count))
    branches = conversations(20 if kind == "picture" else 3, 25, 300)
    if len(branches) == 1:
        return Tree((1, *[3] * (count - 1), branches[0]), sizes)
    return Tree((1, *[3] * count), sizes, branches)


def mixed_pack(rng: np.random.Generator, size: int) -> list[Tree]:
    """Examples of stage 2 until none of 40 more fits into `size` tokens."""
    trees: list[Tree] = []
    room = size
    for _ in range(40):
        tree = sft_example(rng)
        length = len(tree.arrays(0, 1)[0])
        if length <= room:
            trees.append(tree)
            room -= length
    return trees


def long_video_pack(size: int = 36864, frames: int = 384, frame: int = FRAME) -> list[Tree]:
    """One video of stage 3 that fills a pack, with four conversations in what room its frames leave."""
    room = size - len(video(frames, (), frame).arrays(0, 1)[0])
    if room < 4:
        raise ValueError(f"{frames} frames do not fit into {size} tokens")
    return [video(frames, (room - 3 * (room // 4), *[room // 4] * 3), frame)]
