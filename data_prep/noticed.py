"""What the summaries of prepare, index and check say of records that training uses, but not as they are.

The words and the limits are those of training's own count (data/tally.py). Lengths of texts depend on the tokenizer,
which is not always known here, and on the wordings drawn in training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.estimate import is_raw
from data_prep.fits import said, too_long
from molmo2_nemo.data.annotations import Tracks
from molmo2_nemo.data.check import View, drawn_trees, pieces
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.points import marks_in_reach
from molmo2_nemo.data.record import Record
from molmo2_nemo.data.tally import KINDS
from molmo2_nemo.data.video.sampling import FPS_KEYS, TimeSampler, film_lost, repeats_frames
from molmo2_nemo.data.video.tokens import subtitles_shown

COARSE = (
    'tracks without a position for some of the frames shown, as "snap" is less than half the time from one position to '
    "the next; a larger one takes more"
)
REPEATS = "films whose sampling asks for more frames a second than they have: each is shown several times"
SLOW = "films of fewer frames a second than are shown (data.video.max_fps): each is shown several times"
Noted = dict[str, tuple[int, str]]  # text -> records that it holds for, the first one's key


@dataclass
class Notes:
    """Counts of what records have in common."""

    found: Noted = field(default_factory=dict)

    def add(self, texts: Iterable[str], key: str) -> None:
        for text in texts:
            count, first = self.found.get(text, (0, key))
            self.found[text] = count + 1, first

    def update(self, later: Noted) -> None:
        """Add what was found in records that come after these."""
        for text, (count, first) in later.items():
            before, own = self.found.get(text, (0, first))
            self.found[text] = before + count, own

    def json(self) -> dict[str, list[Any]]:
        """As a manifest's head has it: text -> [records, key of the first]."""
        return {text: list(note) for text, note in sorted(self.found.items())}


def note_lines(notes: Mapping[str, Sequence[Any]]) -> list[str]:
    """What is printed of a manifest's notes; a number counts records."""
    lines = [f"  {count:>10,}  {text} (the first: {first})" for text, (count, first) in notes.items()]
    return ["  used, but not as they are, or not in full (records):", *lines] if lines else []


def noticed(
    record: Record, data: Mapping[str, Any], view: View, lost: Collection[str], config: DataConfig
) -> list[str]:
    """What training will leave out of a record, or cut, with these settings.

    Args:
        lost: kinds that wording the record's annotations has met; see `check_record`.
    Raises:
        BadRecord: training skips it at every access; see `too_long`.
    """
    kinds = {*lost, *_of_images(record, config), *_of_film(record, view, config)}
    texts = [kind.said(config) for name, kind in KINDS.items() if name in kinds]
    texts += [COARSE] if _coarse(record, view, config) else []
    if record.video is not None and repeats_frames(config.video, record.sampling, view.fps, view.duration):
        texts.append(REPEATS if {"max_fps", *FPS_KEYS} & set(record.sampling) else SLOW)
    tree = data.get("annotations") or [{}]
    document = tree[0]["text"] if is_raw(tree[0]) else None
    found = too_long(record, view, config, document)
    return texts + [f"{said(name, config)}{found[name]}" for name in sorted(found)]


def _coarse(record: Record, view: View, config: DataConfig) -> bool:
    """Whether a track that snaps has positions further apart than that takes in, and loses shown frames by it."""
    if record.video is None:
        return False
    times = TimeSampler.of(config.video, record.sampling, view.fps)(view.duration)
    for path, tree in drawn_trees(record):
        for _, annotation in pieces(tree, path):
            track = annotation.content
            if isinstance(track, Tracks) and track.snap > 0:
                now, wider = marks_in_reach(track, times)
                if wider > 1.1 * now:
                    return True
    return False


def _of_images(record: Record, config: DataConfig) -> Iterator[str]:
    if len(record.images) > config.image.max_images:
        yield "ignored"


def _of_film(record: Record, view: View, config: DataConfig) -> Iterator[str]:
    if record.video is None:
        return
    if kind := film_lost(config.video, record.sampling, view.fps, view.duration):
        yield kind
    if record.clip is not None and record.clip[1] - record.clip[0] > view.duration + 1 / max(view.fps, 1e-9):
        yield "clips_cut"
    if record.subtitles:
        times = TimeSampler.of(config.video, record.sampling, view.fps)(view.duration)
        shown = subtitles_shown(record.subtitles, times, config.video.subtitle_mode)
        if shown is None or len(shown) < len(record.subtitles):
            yield "subtitles_unseen"
