"""How much a model can be shown and say: what the range of its rotary positions has room for. No torch here.

Options such as --frames are upper limits: of a longer film the model sees as many frames as the option says. One with
which the media alone would leave the range is refused, as the largest that stays inside shows the same of all media
that fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from molmo2_nemo.data.config import DataConfig, ImageConfig
from molmo2_nemo.data.image import TileGeometry
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.tokens import video_token_ids
from molmo2_nemo.inference.prompt import Shown

BEYOND = "--beyond-range"  # the option that lets films leave the range


@dataclass(frozen=True)
class Room:
    """What fits into the rotary range of a model.

    Args:
        data: with the rates and sizes that media are shown with; how many frames or tiles it allows does not matter.
        positions: of the range.
    """

    data: DataConfig
    tokenizer: Molmo2Tokenizer
    positions: int

    def frames(self) -> int:
        """Most frames of a film whose times and patches are in the range. Films are taken to have as many frames a
        second as the settings allow: fewer have times that are longer to write."""
        video = self.data.video
        pooled = tokens_of_frame(self.data)
        count = self.positions // pooled + 1
        times = np.arange(count) / video.max_fps
        ids = np.array(video_token_ids(times, pooled, video, self.tokenizer))
        last = np.flatnonzero(ids == self.tokenizer.special.im_patch)[pooled - 1 :: pooled]  # patch of each frame
        return int(np.count_nonzero(last + 3 <= self.positions))  # one token before the film; its end marker

    def tiles(self) -> int:
        """Most tiles of an image that are in the range beside the global view."""
        most = 1
        while tokens_of_tiles(most + 1, self.data.image) <= self.positions:
            most += 1
        return most

    def problems(
        self, shown: Shown, *, longest: int | None = None, beyond: bool = False, training: bool = False
    ) -> Iterator[str]:
        """What of an answer's options the range has no room for, a line each.

        Args:
            shown: what is asked for.
            longest: answer, in tokens; None: as the tasks have it.
            beyond: films may leave the range.
            training: they are settings of a run (evaluation.*), which has no such option.
        """
        names = ("evaluation.frames=", "evaluation.max_new_tokens=") if training else ("--frames ", "--max-new-tokens ")
        range_ = f"the {self.positions:,} positions that the model's rotary range has"
        most = self.frames()
        if shown.frames is not None and shown.frames > most and not beyond:
            more = "" if training else f", or see with {BEYOND} what the model answers there"
            yield (
                f"{names[0]}{shown.frames}: a film of so many frames takes more than {range_}, which are room for "
                f"{most:,} frames; ask for {most} or fewer{more}"
            )
        if shown.fps is not None and shown.fps > most and not beyond:
            yield (
                f"--fps {shown.fps:g}: one second of film would be more than {range_}, which are room for {most:,} "
                "frames in all; ask for fewer"
            )
        for option, tiles in (
            ("--max-crops", shown.max_crops),
            ("--high-res", self.data.image.high_res_max_crops if shown.high_res else None),
        ):
            if tiles is not None and tokens_of_tiles(tiles, self.data.image) > self.positions:
                of = f"{option} {tiles}" if option == "--max-crops" else f"{option} ({tiles} tiles)"
                yield (
                    f"{of}: an image of so many tiles takes more than {range_}, which are room for {self.tiles():,} "
                    "tiles; ask for fewer with --max-crops"
                )
        if longest is not None and longest >= self.positions:
            yield f"{names[1]}{longest}: such an answer takes more than {range_}; ask for fewer"


def tokens_of_frame(data: DataConfig) -> int:
    """Tokens of a film's frame, without its time and markers."""
    return math.ceil(TileGeometry.of(data.image).grid / data.video.pool) ** 2


def tokens_of_tiles(count: int, config: ImageConfig) -> int:
    """Tokens of an image of about so many tiles, as nearly square as they can be laid, and of its global view."""
    geometry = TileGeometry.of(config)
    rows = math.isqrt(count)
    sides = (-(-(n * geometry.window_patches + 2 * geometry.margin) // geometry.pool) for n in (rows, count // rows))
    height, width = sides
    view = -(-geometry.grid // geometry.pool)
    return height * (width + 1) + view**2 + 4
