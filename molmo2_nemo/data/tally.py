"""What happens to records on their way into training without stopping it: skipped, left out, cut off, replaced.

`KINDS` is the one list of what is counted beside skipped records, and of its words; `Example.info` holds an example's
counts under these names. `Tally` sums them over a run, per data set and with the first record of each kind.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.pieces import record_of

EXAMPLES = "examples"  # a kind too: examples read
PASSED_OVER = "documents_passed_over"  # a kind, of documents that are no examples in this epoch
SKIPPED = "skipped: "  # the kind of a skipped record is this and its cause
UNKNOWN = ""  # the data set of what a checkpoint without data sets had counted
BEFORE = "counted before data sets were told apart"
SHOWN = 10  # data sets of a kind in a table


@dataclass(frozen=True, slots=True)
class Kind:
    """Something that is counted, and the settings below `data.` that decide about it."""

    words: str  # what is counted, in the plural; {} is the first setting's value
    settings: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        """The words alone."""
        return self.words.replace(" {}", " ones")

    def said(self, config: DataConfig) -> str:
        """The words with the settings' values."""
        values = []
        for name in self.settings:
            section, _, key = name.partition(".")
            values.append(f"data.{name}={getattr(getattr(config, section), key)}")
        words = self.words.replace("{}", values[0].partition("=")[2]) if values else self.words
        return f"{words} ({', '.join(values)})" if values else words


KINDS = {
    "ignored": Kind("images after the first {}, left out", ("image.max_images",)),
    "points_ignored": Kind("points in images that are left out", ("image.max_images",)),
    "points_unseen": Kind("tracked points at times without a sampled frame, left out", ("video.max_frames",)),
    "points_moved": Kind("points outside the picture, moved to its edge"),
    "branches_dropped": Kind("annotations beyond a sequence, left out", ("packing.sequence_length",)),
    "tokens_cut": Kind("tokens beyond a sequence, cut off", ("packing.sequence_length",)),
    "documents_split": Kind("documents longer than a sequence, split into several", ("packing.sequence_length",)),
    PASSED_OVER: Kind("documents that their length's rate lets come in other epochs (data.sources.NAME.length_rates)"),
    "subtitles_unseen": Kind("subtitle lines near no sampled frame, left out", ("video.subtitle_mode",)),
    "subtitle_tokens_cut": Kind("tokens of subtitles beyond their limit, cut off", ("video.max_subtitle_tokens",)),
    "films_thinned": Kind("films longer than their frames at max_fps, sampled sparsely", ("video.max_frames",)),
    "films_cut": Kind("films whose end is not shown (sampling mode fps)", ("video.max_frames",)),
    "clips_cut": Kind("clips that end after their film, cut at its end"),
    "truncated": Kind("images cut off inside, loaded as far as they go", ("image.truncated",)),
    "replaced_frames": Kind("frames that cannot be decoded, the one before in their place"),
    "places_left_empty": Kind("places left empty in packs, the media damaged inside"),
}


def counted(info: Mapping[str, Any]) -> dict[str, int]:
    """What of an example's `info` is counted."""
    return {name: int(info[name]) for name in KINDS if info.get(name)}


def words_of(kind: str, config: DataConfig) -> str:
    """What a table says for a kind, that of skipped records included."""
    return f"records {kind}" if kind.startswith(SKIPPED) else KINDS[kind].said(config) if kind in KINDS else kind


class Seen(NamedTuple):
    """An example that was read, and what was counted for it."""

    number: int  # of the stream; of a piece of a document see pieces.py
    key: str
    source: str
    counts: dict[str, int]  # kind -> how many; not `EXAMPLES`


class Count(NamedTuple):
    """How many of a kind; `first` is the smallest number in the stream and the key of a record that it happened to."""

    amount: int
    first: tuple[int, str] | None = None


@dataclass(slots=True)
class Tally:
    """Counts per data set and kind. A change may be negative: an example that turned out to be unusable."""

    found: dict[tuple[str, str], Count] = field(default_factory=dict)  # (data set, kind) -> count

    def add(self, source: str, kind: str, count: int, first: tuple[int, str] | None = None) -> None:
        before = self.found.get((source, kind), Count(0))
        firsts = [f for f in (before.first, first) if f is not None]
        now = Count(before.amount + count, min(firsts) if firsts else None)
        if now.amount or now.first is not None:
            self.found[source, kind] = now
        else:
            self.found.pop((source, kind), None)

    def read(self, seen: Seen) -> None:
        """Count an example."""
        self.add(seen.source, EXAMPLES, 1)
        for kind, count in seen.counts.items():
            self.add(seen.source, kind, count, (record_of(seen.number), seen.key))

    def unread(self, seen: Seen) -> None:
        """Take an example out again. What was counted before data sets were known is taken from there."""
        for kind, count in {EXAMPLES: 1, **seen.counts}.items():
            known = (seen.source, kind) in self.found or (UNKNOWN, kind) not in self.found
            self.add(seen.source if known else UNKNOWN, kind, -count)

    def update(self, other: Tally) -> None:
        for (source, kind), count in other.found.items():
            self.add(source, kind, count.amount, count.first)

    def copy(self) -> Tally:
        return Tally(dict(self.found))

    def totals(self) -> Counter[str]:
        """Kind -> count over all data sets."""
        sums: Counter[str] = Counter()
        for (_, kind), count in self.found.items():
            sums[kind] += count.amount
        return sums

    def skipped(self) -> Counter[str]:
        """Cause -> records skipped."""
        return Counter({k.removeprefix(SKIPPED): n for k, n in self.totals().items() if n and k.startswith(SKIPPED)})

    def counts(self) -> Counter[str]:
        """Kind -> count, without skipped records."""
        return Counter({k: n for k, n in self.totals().items() if n and not k.startswith(SKIPPED)})

    def kinds(self) -> dict[str, dict[str, Count]]:
        """Kind -> data set -> count, where there is one; the data sets with the most first. Without `EXAMPLES`."""
        found: dict[str, dict[str, Count]] = {}
        for (source, kind), count in sorted(self.found.items(), key=lambda item: (-item[1].amount, item[0])):
            if count.amount > 0 and kind != EXAMPLES:
                found.setdefault(kind, {})[source] = count
        return found

    def table(self, config: DataConfig, width: int = 80) -> list[str]:
        """Lines of a table, by kind: every data set's count, and the first record. Empty where nothing is to be said.

        Args:
            width: most characters of a line; a long key loses its middle.
        """
        lines: list[str] = []
        for kind, sources in self.kinds().items():
            total = f"{sum(count.amount for count in sources.values()):>10,} "
            words = words_of(kind, config)
            lines += textwrap.wrap(words, width, initial_indent=total, subsequent_indent=" " * 13)
            for source, count in list(sources.items())[:SHOWN]:
                line = f"{count.amount:>18,} {source or BEFORE}"
                if count.first:
                    line += f", first {_shortened(count.first[1], max(width - len(line) - 8, 10))}"
                lines.append(line)
            if len(sources) > SHOWN:
                lines.append(f"{'':19}and {len(sources) - SHOWN} more data sets")
        return lines

    # --- as JSON ----------------------------------------------------------------------------------------------------

    def json(self) -> dict[str, dict[str, list[Any]]]:
        """Data set -> kind -> [count], or [count, number in the stream, key of the first record]."""
        made: dict[str, dict[str, list[Any]]] = {}
        for (source, kind), count in sorted(self.found.items()):
            if count.amount or count.first:
                made.setdefault(source, {})[kind] = [count.amount, *(count.first or ())]
        return made

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Data set -> kind -> `count` and, but for `EXAMPLES`, `first`: the key of the first record."""
        return {
            source: {
                kind: {"count": count} | ({"first": first[1]} if first else {})
                for kind, (count, *first) in kinds.items()
                if count
            }
            for source, kinds in self.json().items()
        }

    @classmethod
    def of_json(cls, value: Mapping[str, Mapping[str, list[Any]]]) -> Tally:
        tally = cls()
        for source, kinds in value.items():
            for kind, (count, *first) in kinds.items():
                tally.add(source, kind, count, (first[0], first[1]) if first else None)
        return tally

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Tally:
        """What the saved state of a stream says of all that was read up to it, batches used out of order included.

        States of before data sets were counted have totals only: they are those of the data set `UNKNOWN`.
        """
        if "by_source" in state:
            tally = cls.of_json(state["by_source"])
        else:
            tally = cls()
            for kind, count in state.get("counts", {}).items():
                tally.add(UNKNOWN, kind, count)
            for cause, count in state.get("skipped", {}).items():
                tally.add(UNKNOWN, SKIPPED + cause, count)
        if ahead := state.get("ahead"):
            waiting = {number for number, _ in state["packer"]["waiting"]}
            new = len(set(ahead["used"]) - waiting)
            tally.update(cls.of_json(ahead.get("counted", {UNKNOWN: {EXAMPLES: [new]}})))
        return tally


def waiting_unused(state: Mapping[str, Any]) -> Iterable[Seen]:
    """The examples that a saved state has counted, and that no batch has used; read anew where packs are made anew."""
    used = set(state.get("ahead", {}).get("used", ()))
    packer = state["packer"]
    counted = packer.get("counted", [["", UNKNOWN, {}]] * len(packer["waiting"]))
    for (number, _), (key, source, counts) in zip(packer["waiting"], counted, strict=True):
        if number not in used:
            yield Seen(number, key, source, counts)


def _shortened(key: str, room: int) -> str:
    if len(key) <= room:
        return key
    end = (room - 3) // 2
    return f"{key[: room - 3 - end]}...{key[-end:]}"
