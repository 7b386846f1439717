"""What has changed since a data set was prepared, by its ledger alone: nothing of the source is read."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from data_prep.download import FAILED
from data_prep.ledger import Line, Medium, read_lines, state_of
from data_prep.media import Resolver
from data_prep.media_kinds import NOT_FOUND

THREADS = 8  # that look for files
BLOCK_LINES = 256


@dataclass
class Look:
    """What is to be prepared anew. Memory: 8 bytes for each such item, and a number for each medium that differs."""

    items: int = 0  # in the ledger
    media: int = 0  # that were looked at
    skipped: int = 0
    due: array[int] = field(default_factory=lambda: array("Q"))  # numbers of items, ascending
    retried: int = 0  # of those, items that were skipped
    changed: int = 0  # media of records whose content is another, each once
    first_changed: str = ""
    gone: int = 0  # media of records that are no longer there, each once
    first_gone: str = ""
    named: set[int] = field(default_factory=set)  # hashes of the names of both

    def is_due(self, number: int) -> bool:
        """Whether an item is to be prepared anew."""
        place = bisect_left(self.due, number)
        return place < len(self.due) and self.due[place] == number


def look(ledger: Path, resolver: Resolver) -> Look:
    """Compare all media of a ledger with what is below --source."""
    found, blocks = Look(), _blocks(ledger)
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque(pool.submit(_compared, block, resolver) for block in islice(blocks, 2 * THREADS))
        while waiting:
            lines = waiting.popleft().result()
            waiting.extend(pool.submit(_compared, block, resolver) for block in islice(blocks, 1))
            for line, changed, gone in lines:
                _take(found, line, changed, gone)
    return found


def _blocks(ledger: Path) -> Iterator[list[Line]]:
    lines = read_lines(ledger)
    while block := list(islice(lines, BLOCK_LINES)):
        yield block


def _compared(lines: Iterable[Line], resolver: Resolver) -> list[tuple[Line, list[Medium], list[Medium]]]:
    """(line, media that have changed or come, media that have gone) for each line."""
    return [(line, *_differ(line, resolver)) for line in lines]


def _differ(line: Line, resolver: Resolver) -> tuple[list[Medium], list[Medium]]:
    changed, gone = [], []
    for medium in line.media:
        if not medium.there:
            names = medium.names if line.reason else ()
            if any(state_of(name, resolver) is not None for name in names if "://" not in name):
                changed.append(medium)
            continue
        now = state_of(medium.names[0], resolver, medium)
        if now is None:
            gone.append(medium)
        elif (now.size, now.digest) != (medium.size, medium.digest):
            changed.append(medium)
    return changed, gone


def _take(found: Look, line: Line, changed: list[Medium], gone: list[Medium]) -> None:
    """Count a line."""
    number, found.items = found.items, found.items + 1
    found.media += len(line.media)
    if line.reason:
        found.skipped += 1
        if changed or line.reason == FAILED or (line.reason == NOT_FOUND and not line.media):
            found.due.append(number)
            found.retried += 1
        return
    found.gone += _new(found, gone)
    found.first_gone = found.first_gone or (gone[0].shown if gone else "")
    if changed:
        found.due.append(number)
        found.changed += _new(found, changed)
        found.first_changed = found.first_changed or changed[0].shown


def _new(found: Look, media: list[Medium]) -> int:
    """How many of these media no record has shown before."""
    names = {hash(medium.shown) for medium in media} - found.named
    found.named |= names
    return len(names)
