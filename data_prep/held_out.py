"""Held-out data: a share of one's own records, or the validation split of a published data set.

A share is taken by what a record shows, never by its place in the file: each image or film belongs to one side, by a
hash of its path, address or bytes (in a tar, of the names of tar and member), a text by a hash of its words. So records
of the same picture are on the same side, and a record stays on its side when lines are added or sorted. Both sides are
data sets of their own: NAME without the held-out records, and NAME-validation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from data_prep.sources.base import Context, File, Inline, Media, Row, Sample, Skip, Source, Stored, Url
from data_prep.sources.references import parts
from molmo2_nemo.errors import UserError

VALIDATION = "-validation"  # at the end of a held-out data set's name
BOTH_SIDES = "shows media of both sides of --hold-out"


@dataclass(frozen=True)
class HeldOut:
    """One side of a user's own data: what is held out, or the rest.

    Args:
        share: of the media, above 0 and at most 0.5.
    """

    share: float
    held: bool

    @classmethod
    def parse(cls, text: str) -> float:
        """The share that `--hold-out` names: "2%" or 0.02.

        Raises:
            UserError: no number, or one out of range.
        """
        try:
            share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share <= 0.5:
            raise UserError(f"--hold-out {text}: expected a share above 0 and at most 50%, such as 2% or 0.02")
        return share

    def folder(self, out: Path) -> Path:
        return validation_folder(out) if self.held else out

    def source(self, source: Source) -> Source:
        """The source of this side's samples only."""

        def records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
            return self.select(source.records(rows, ctx))

        return replace(source, records=records)

    def select(self, items: Iterable[Sample | Skip]) -> Iterator[Sample | Skip]:
        """The samples of this side. What is skipped, and samples with media of both sides, are reported by the side
        that is not held out."""
        for item in items:
            sides = {False} if isinstance(item, Skip) else {self._holds(mark) for mark in marks(item)}
            if sides == {self.held}:
                yield item
            elif len(sides) > 1 and not self.held:
                yield Skip(item.key, BOTH_SIDES, "left out of both data sets", place=item.place)

    def _holds(self, mark: str) -> bool:
        digest = hashlib.sha256(f"held out {mark}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


def validation_folder(out: Path) -> Path:
    return out.with_name(out.name + VALIDATION)


def marks(sample: Sample) -> list[str]:
    """What a sample shows: a mark for each image or film, or one of its texts."""
    return [_mark(one) for one in sample.media] or [f"text {[list(tree) for tree in sample.trees()]!r}"]


def _mark(medium: Media) -> str:
    medium, _ = next(parts(medium))
    if isinstance(medium, File):
        return f"file {PurePosixPath(medium.paths[0])}"
    if isinstance(medium, Url):
        return f"url {medium.url}"
    if isinstance(medium, Stored):
        return f"member {medium.name} of {PurePosixPath(medium.path).name}"
    if isinstance(medium, Inline):
        return f"bytes {hashlib.sha256(medium.data).hexdigest()}"
    return repr(medium)


# --- published data sets ---------------------------------------------------------------------------------------------


def validation_source(source: Source) -> Source:
    """The same data set's validation split.

    Raises:
        UserError: it has none here; names those that do.
    """
    from data_prep.sources.validation import names, origin_of

    if source.name not in names():
        raise UserError(
            f"{source.name} has no validation split here; these have one: {', '.join(names())}. Of your own data a "
            "share is held out with --hold-out"
        )
    return replace(source, origin=origin_of(source))
