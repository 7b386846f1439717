"""Pieces of documents that are longer than a pack, and their numbers in the stream.

A document of T inputs is split at multiples of the pack's tokens; labels are shifted already, so every target is in
exactly one piece. Each piece is an example: it sees nothing of the pieces before it, and its positions count from 0.

The number of a piece is one integer that says which tokens of which document it is, so that it can be saved, read again
in another process, and told apart from what was used: number of the record + first token * 2^40 + end * 2^80. The end
is 0 for the last piece, so that a record that is not split has its own number.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from molmo2_nemo.data.example import Example
from molmo2_nemo.errors import DataError

BITS = 40
MASK = (1 << BITS) - 1
TOKEN_FIELDS = ("input_ids", "labels", "loss_weights", "branch_ids", "visual")

Numbered = tuple[int, Example]


def piece_number(record: int, start: int, end: int) -> int:
    """The number of the tokens from `start` to before `end` of the record with that number; `end` 0: to its last."""
    return record | start << BITS | end << 2 * BITS


def of_piece(number: int) -> tuple[int, int, int]:
    """Number of the record, first token and end (0: to the last token) of a piece."""
    return number & MASK, number >> BITS & MASK, number >> 2 * BITS


def record_of(number: int) -> int:
    """Number of the record that a piece is of."""
    return number & MASK


def split(number: int, example: Example, length: int) -> list[Numbered]:
    """The pieces of an example, each at most `length` tokens, with their numbers.

    Args:
        number: of the part of the document that is to be split.
        example: the whole document, without crops.
    Raises:
        DataError: the document has no such part; it is another one than before.
    """
    record, start, end = of_piece(number)
    total = example.num_tokens
    if start >= total or end > total:
        raise DataError(f"tokens {start} to {end or 'the end'} of a document that has {total}; it has changed")
    pieces = []
    for first in range(start, end or total, length):
        stop = min(first + length, end or total)
        pieces.append((piece_number(record, first, 0 if stop == total else stop), _piece(example, first, stop)))
    return pieces


def _piece(example: Example, start: int, stop: int) -> Example:
    """The tokens from `start` to before `stop`."""
    total = example.num_tokens
    if (start, stop) == (0, total):
        return example
    arrays = {name: getattr(example, name)[start:stop].copy() for name in TOKEN_FIELDS}
    info = {**example.info, "piece": [start, stop, total]}
    if start == 0:
        info["documents_split"] = 1
    return dataclasses.replace(example, **arrays, position_ids=np.arange(stop - start), info=info)


def rest(pieces: list[Numbered]) -> int:
    """The number of what consecutive pieces are together."""
    record, start, _ = of_piece(pieces[0][0])
    return piece_number(record, start, of_piece(pieces[-1][0])[2])


def without(numbers: Iterable[int], used: Iterable[int]) -> list[int]:
    """What is left of `numbers` after `used`, in the order of records and their tokens."""
    gone: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for number in used:
        record, start, end = of_piece(number)
        gone[record].append((start, end or math.inf))
    left: list[int] = []
    for number in set(numbers):
        left += _without(number, sorted(gone.get(record_of(number), ())))
    return sorted(left, key=of_piece)


def _without(number: int, gone: list[tuple[int, float]]) -> list[int]:
    record, start, stop = of_piece(number)
    at, end, left = start, stop or math.inf, []
    for first, last in gone:
        if last <= at or first >= end:
            continue
        if first > at:
            left.append(piece_number(record, at, first))
        at = int(min(last, end)) if min(last, end) != math.inf else -1
        if at < 0 or at == end:
            return left
    return [*left, piece_number(record, at, stop)]
