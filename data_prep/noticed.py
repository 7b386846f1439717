"""What the summaries of prepare, index and check say of records that training uses, but not as they are.

The words and the limits are those of training's own count (data/tally.py). Lengths of texts are estimated, as they
depend on the tokenizer and on the wordings drawn in training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.estimate import branch_costs, is_raw, subtitle_cost, visual_cost
from molmo2_nemo.data.check import View
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.record import Record
from molmo2_nemo.data.tally import KINDS
from molmo2_nemo.data.video.sampling import TimeSampler, film_lost
from molmo2_nemo.data.video.tokens import subtitles_shown

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
    """
    kinds = {*lost, *_of_images(record, config), *_of_film(record, view, config)}
    texts = [kind.said(config) for name, kind in KINDS.items() if name in kinds]
    return texts + [f"{KINDS[name].said(config)}, by estimate" for name in _too_long(data, view, config)]


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


def _too_long(data: Mapping[str, Any], view: View, config: DataConfig) -> list[str]:
    """Kinds of what does not fit a sequence with the branches in the worst of their orders."""
    limit = config.packing.sequence_length
    root = visual_cost(view, data.get("sampling", {}), config) + subtitle_cost(data.get("subtitles", ()))
    found = set()
    for tree in data.get("variants") or [data["annotations"]]:
        costs = branch_costs(tree)
        whole = root + sum(costs)
        if len(costs) > 1 and whole - min(costs) > limit:
            found.add("branches_dropped")
        elif whole > limit:
            found.add("documents_split" if is_raw(tree[0]) else "tokens_cut")
    return sorted(found)
