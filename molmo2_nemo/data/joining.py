"""Documents of a pack that see each other (`data.text.document_mask=false`), and chunks of them interleaved.

Without a document mask the raw text of a pack is one causal sequence whose positions run on, as in usual
pre-training: document, boundary token, document. Examples with a question stay apart, and see only themselves.

`data.text.shuffle_chunks` also ties knots (Untie the Knots, arXiv 2409.04774; its authors' gpt_dataset_utk.py): a
document is cut at random places, and the chunks of a pack's documents are interleaved, those of one document in their
order. Where a document breaks off there is a mark, and where it goes on there is another one, with the chunk's number.
As in the paper, finding what a chunk continues is what attention over a long distance learns from. Three choices are
ours. Marks are plain text, as the vocabulary gets no new tokens. They are no targets, as nobody can know which chunk
comes next. Room for them is reserved, where the authors cut the end of the sequence. So every target of a document is
scored once, the first one of a chunk behind its mark.

What is drawn follows from the seed and the documents' numbers in the stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from molmo2_nemo.data.config import TextFormatConfig
from molmo2_nemo.data.example import PAD_TOKEN, ROOT_BRANCH, Example, Run
from molmo2_nemo.data.mixture import stable_key

HEAD, TAIL = "<chunk {}>", "</chunk {}>"  # before a chunk that goes on, behind one that breaks off


class Mark(NamedTuple):
    """The tokens round a chunk, int64 each."""

    head: np.ndarray
    tail: np.ndarray


def random_bits(seed: int, *what: object) -> np.random.Philox:
    """Bits that follow from the seed and what they are for."""
    return np.random.Philox(key=stable_key("chunks", seed, *what))


def cut_chunks(document: Example, marks: Sequence[Mark], room: int, bits: np.random.Philox) -> Example:
    """A document in at most `len(marks)` chunks, marks included; `chunks` has their lengths.

    Args:
        document: T tokens, without crops.
        marks: of each chunk.
        room: tokens that the document may have with its marks. There are fewer chunks where these do not fit.
        bits: decide the number of chunks, each as likely, and where they begin.
    """
    total = document.num_tokens
    count = 1 + int(bits.random_raw() % min(len(marks), total))
    while count > 1 and total + _length(marks[:count]) > room:
        count -= 1
    places: list[int] = []
    if count > 1:
        places = [1 + int(i) for i in np.argsort(bits.random_raw(total - 1), kind="stable")[: count - 1]]
    edges = [0, *sorted(places), total]
    made = [_chunk(document, marks, i, edges[i], edges[i + 1], i == count - 1) for i in range(count)]
    ids, labels, weights = (np.concatenate(arrays) for arrays in zip(*made, strict=True))
    return dataclasses.replace(
        document, **_plain(ids, labels, weights), chunks=[len(chunk) for chunk, _, _ in made], info={**document.info}
    )


def _length(marks: Sequence[Mark]) -> int:
    """Tokens of the marks of that many chunks."""
    return sum(len(mark.head) for mark in marks[1:]) + sum(len(mark.tail) for mark in marks[:-1])


def _chunk(
    document: Example, marks: Sequence[Mark], number: int, start: int, stop: int, last: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and weights of the tokens from `start` to before `stop`."""
    head, tail = marks[number].head[: None if number else 0], marks[number].tail[: 0 if last else None]
    ids = np.concatenate([head, document.input_ids[start:stop], tail])
    after = document.labels[stop - 1] if last else PAD_TOKEN  # behind a tail nothing is scored
    weights = np.zeros(len(ids), np.float32)
    scored = slice(start, stop if last else stop - 1)  # the last target stands behind the next chunk's head
    weights[len(head) :][: scored.stop - scored.start] = document.loss_weights[scored]
    if len(head):
        weights[len(head) - 1] = document.loss_weights[start - 1]
    return ids, np.concatenate([ids[1:], [after]]), weights


def join_documents(pack: list[Example], numbers: Sequence[int], text: TextFormatConfig, seed: int) -> list[Example]:
    """The examples of a pack, its documents as one in the place of the first. It holds the same tokens.

    Args:
        numbers: of its documents in the stream.
    """
    places = [i for i, example in enumerate(pack) if example.info.get("raw_text")]
    if text.document_mask or len(places) < 2:
        return pack
    documents = [pack[i] for i in places]
    lengths = [document.chunks or [document.num_tokens] for document in documents]
    turns = np.repeat(np.arange(len(documents)), [len(each) for each in lengths])  # the document of each chunk
    if text.shuffle_chunks:
        bits = random_bits(seed, "order", *numbers)
        turns = turns[np.argsort(bits.random_raw(len(turns)), kind="stable")]
    at, taken = [0] * len(documents), [0] * len(documents)
    slices: list[tuple[Example, slice]] = []
    runs: list[Run] = []
    for turn in turns:
        document, length = documents[turn], lengths[turn][taken[turn]]
        runs.append(Run("" if taken[turn] else document.key, document.source, length))
        slices.append((document, slice(at[turn], at[turn] + length)))
        at[turn], taken[turn] = at[turn] + length, taken[turn] + 1
    ids, labels, weights = (
        np.concatenate([getattr(document, name)[where] for document, where in slices])
        for name in ("input_ids", "labels", "loss_weights")
    )
    key = documents[0].key + f" and {len(documents) - 1} more"
    info = {name: value for name, value in documents[0].info.items() if name != "piece"}
    joined = dataclasses.replace(documents[0], **_plain(ids, labels, weights), key=key, info=info, chunks=[], runs=runs)
    return [joined if i == places[0] else example for i, example in enumerate(pack) if i not in places[1:]]


def _plain(ids: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The token arrays of one causal sequence of text."""
    count = len(ids)
    return {
        "input_ids": ids,
        "labels": labels,
        "loss_weights": weights,
        "position_ids": np.arange(count),
        "branch_ids": np.full(count, ROOT_BRANCH, np.int64),
        "visual": np.zeros(count, bool),
    }
