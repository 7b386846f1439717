"""Raw text: a whole document of which every token is scored, without a question and without media.

Its tokens are those of pre-training: the token between documents, the document, and that token again; all but the first
are targets. A document longer than a pack is split into pieces (pieces.py), never cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo2_nemo.data.example import ROOT_BRANCH
from molmo2_nemo.data.json_values import Fault, FieldError, show
from molmo2_nemo.data.styles import RAW_TEXT, Style, style_of
from molmo2_nemo.data.tree import FlatTree

FIELDS = frozenset({"style", "text"})  # of its annotation


@dataclass(frozen=True, slots=True)
class RawText:
    """A document."""

    style: Style
    text: str


def read_raw_text(fields: dict[str, Any]) -> RawText:
    """The document of an annotation. Raises FieldError: not a text, or fields that belong to a question."""
    if not isinstance(fields.get("text"), str):
        raise FieldError.wrong("text", "a document, a string", fields.get("text"))
    for name in fields:
        if name not in FIELDS:
            fault = Fault(name, show(fields[name]), "only style and text")
            raise FieldError(fault, "does not belong to raw text, which has no question; leave it out")
    return RawText(style_of(fields["style"]), fields["text"])


def alone() -> FieldError:
    """The error for raw text that shares a record with something else."""
    expected = "raw text as the only annotation of a record without media and alternatives"
    return FieldError(Fault("style", RAW_TEXT, expected), f"is {RAW_TEXT}; expected {expected}")


def document_tokens(ids: np.ndarray, boundary: int, weight: float) -> FlatTree:
    """The shifted arrays of a document of n tokens: n + 1 inputs, each of whose labels is scored.

    Args:
        ids: int64 [n].
        boundary: the token between documents.
        weight: of every target.
    """
    sequence = np.concatenate([[boundary], ids, [boundary]]).astype(np.int64)
    count = len(sequence) - 1
    return FlatTree(
        input_ids=sequence[:-1],
        labels=sequence[1:],
        loss_weights=np.full(count, weight, np.float32),
        position_ids=np.arange(count),
        branch_ids=np.full(count, ROOT_BRANCH, np.int64),
        kept=1,
        dropped=0,
        cut=0,
    )
