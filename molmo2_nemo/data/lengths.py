"""Several pack lengths in one run (Dataset Decomposition, arXiv 2405.13226): `data.lengths`.

Every optimizer step has packs of one length, drawn by the shares, and as many of them as give the same number of
tokens. An example is of the shortest length that holds it. A document is cut into the greatest lengths that it fills,
and its rest is of the shortest one, beside others. Each length reads the stream from a place of its own and passes over
what is not of it: it has its own epochs, and no example waits for its turn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from molmo2_nemo.data.config import DataConfig, LengthConfig
from molmo2_nemo.data.mixture import stable_key


def of_length(config: DataConfig, number: int) -> DataConfig:
    """The settings of one of the lengths; which one it is, its packing says."""
    lengths = [dataclasses.replace(one, max_crops=one.max_crops or config.packing.max_crops) for one in config.lengths]
    own = lengths[number]
    crops = own.max_crops or config.packing.max_crops
    packing = dataclasses.replace(config.packing, sequence_length=own.sequence_length, max_crops=crops)
    return dataclasses.replace(config, packing=packing, lengths=lengths)


def length_at(config: DataConfig, step: int) -> int:
    """Number of the length of optimizer step `step` (from 0)."""
    edges = np.cumsum([one.share for one in config.lengths])
    bits = int(np.random.Philox(key=stable_key("length", config.seed, step)).random_raw())
    place = int(np.searchsorted(edges, (bits >> 11) * 2.0**-53 * edges[-1], side="right"))
    return min(place, max(i for i, one in enumerate(config.lengths) if one.share > 0))


def micro_batches(config: DataConfig, number: int, longest: int) -> int:
    """Micro-batches of a step with packs of one of the lengths, where one with the longest has `longest`."""
    return longest * config.packing.sequence_length // config.lengths[number].sequence_length


def of_example(lengths: Sequence[LengthConfig], tokens: int, crops: int) -> int | None:
    """Length in tokens of the packs that an example belongs to; None: no pack holds it."""
    fits = (one.sequence_length for one in lengths if tokens <= one.sequence_length and crops <= (one.max_crops or 0))
    return next(fits, None)


def of_document(lengths: Sequence[LengthConfig], tokens: int, length: int) -> tuple[int, int] | None:
    """First token and end of the part of a document that packs of that length get; None: no part."""
    start = 0
    for one in reversed(lengths):
        shortest = one is lengths[0]
        end = tokens if shortest else start + (tokens - start) // one.sequence_length * one.sequence_length
        if one.sequence_length == length:
            return (start, end) if end > start else None
        start = end
    raise AssertionError(f"{length} is none of the lengths")


def length_problems(config: DataConfig, longest: int | None = None) -> Iterator[str]:
    """What is wrong with the lengths, in words.

    Args:
        longest: micro-batches of a rank in a step of the longest packs, where it is known.
    """
    lengths, size = config.lengths, config.packing.sequence_length
    if not lengths:
        return
    if config.progression:
        yield "data.lengths with data.progression: a step's length follows from one of them; leave the other empty"
    before = 0
    for i, one in enumerate(lengths):
        key = f"data.lengths[{i}]"
        if one.sequence_length <= before:
            yield f"{key}.sequence_length={one.sequence_length}: must be more than {before}; let lengths ascend"
        elif longest is not None and longest * size % one.sequence_length:
            least = math.lcm(size, one.sequence_length) // size
            yield (
                f"{key}.sequence_length={one.sequence_length}: a step of {longest} micro-batches of {size} tokens on a "
                f"rank is no whole number of them; take a divisor of {longest * size}, or a multiple of {least} "
                "micro-batches (stage.global_batch_size)"
            )
        if not 0 <= one.share < math.inf:
            yield f"{key}.share={one.share}: must be a finite number of at least 0"
        if one.max_crops is not None and not 1 <= one.max_crops <= config.packing.max_crops:
            most = config.packing.max_crops
            yield f"{key}.max_crops={one.max_crops}: must be from 1 to data.packing.max_crops={most}"
        before = one.sequence_length
    if lengths[-1].sequence_length != size:
        yield (
            f"data.lengths ends at {lengths[-1].sequence_length} tokens, but data.packing.sequence_length={size}: the "
            "last is the longest pack, which a step's tokens are counted in; make them equal"
        )
    if not any(one.share > 0 for one in lengths):
        yield "data.lengths: every share is 0, so no length could be drawn; give one a share above 0"
