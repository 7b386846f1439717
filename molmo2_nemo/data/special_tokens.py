"""The visual special tokens: their order behind the base vocabulary, their names, and where images begin. No torch.

Ids of the published checkpoints depend on the order: token number `vocab_size + i` is `EXTRA_SPECIAL_TOKENS[i]`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

EXTRA_SPECIAL_TOKENS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
    "<|points|>",
    "<|token_index|>",
    "<|vit_index|>",
    "<|vit_loc|>",
)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the visual special tokens. `im_start` is `<im_start>` (an image), not the chat token `<|im_start|>`."""

    im_start: int
    im_end: int
    im_patch: int
    im_col: int
    low_res_im_start: int
    image: int
    im_low: int
    frame_start: int
    frame_end: int
    video: int

    @classmethod
    def at(cls, base: int) -> SpecialIds:
        """The ids that follow a base vocabulary of `base` entries."""
        names = [f.name for f in fields(cls)]  # declared in the order of EXTRA_SPECIAL_TOKENS
        return cls(**{name: base + i for i, name in enumerate(names)})

    @property
    def visual(self) -> frozenset[int]:
        """The eight ids whose positions attend to each other in both directions; placeholders are not among them."""
        return frozenset(
            (
                self.im_patch,
                self.im_col,
                self.im_start,
                self.low_res_im_start,
                self.frame_start,
                self.im_end,
                self.frame_end,
                self.im_low,
            )
        )


OFFSETS = SpecialIds.at(0)  # ids counted from the end of the base vocabulary


def image_numbers(input_ids: Any, visual: Any, vocab_size: int) -> Any:
    """Running number of the image or frame that each visual token belongs to; 0 for text.

    A new image begins at <low_res_im_start> or <frame_start>, or at an <im_start> that does not directly follow the end
    of a low-resolution view (frames marked with <im_start> have their timestamp in between).

    Only `within_image` attention distinguishes images. The released code counts the first two markers alone (and says
    that it assumes them), so under it a video whose frames carry <im_start> would be a single image; no released model
    was trained that way.

    Args:
        input_ids: int64 [B, S], a numpy array or a torch tensor.
        visual: bool [B, S], of the same kind.
        vocab_size: rows of the base vocabulary, which is also the id of <im_start>.

    Returns:
        int64 [B, S], of the same kind.
    """
    extra = input_ids - vocab_size
    starts = extra == OFFSETS.im_start
    starts[:, 1:] &= extra[:, :-1] != OFFSETS.im_end
    starts |= (extra == OFFSETS.low_res_im_start) | (extra == OFFSETS.frame_start)
    return starts.cumsum(1).clip(min=1) * visual
