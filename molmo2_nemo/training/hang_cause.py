"""Which rank the others of a hung run wait for, from what each has written down of where it is (watchdog.py).

In a process group a rank that has begun more collectives than another waits for it, and that one may wait for a third.
Where these chains end is the cause: at ranks that wait for nobody, or that wait in a circle because one of them left a
collective out. Of a circle, and of ranks whose counts are equal, the program's order tells: who is ahead in it has left
something out. Messages between pipeline stages are not counted.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NOT_COME, LEFT_OUT = "did not come", "left out a collective that the others are in"
PASSED, ENDLESS = "is in a collective that the others are past", "is in a collective that all its ranks have begun"
MESSAGE = "waits for a message of another pipeline stage"
MESSAGES = "/pipeline_parallel/p2p_communication.py "  # on the stack of a rank that does


@dataclass
class Place:
    """Where a rank is, as its file says."""

    rank: int
    host: str
    pid: int
    began: int | None  # process_start, which tells it from a later process with this id
    gpu: int | None
    words: str = "starting"
    order: list[int] = field(default_factory=lambda: [0, 0, 0])
    line: str = ""  # of Python, that the main thread is at
    stack: list[tuple[str, int]] = field(default_factory=list)  # of it: function and line, the outermost first
    collectives: dict[str, int] = field(default_factory=dict)  # that it has begun, in each process group
    waits: bool = False  # for other ranks: in a collective, or for data that they read
    stuck: float = 0.0  # seconds without progress; 0 where there is some
    looks: int = 0  # of the thread; a number that stands still is a process that does
    held: bool = False  # in a debugger
    stopped: list[int] = field(default_factory=list)  # ranks of this host whose process is stopped
    alarm: bool = False  # its stacks are written

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}{'' if self.gpu is None else f', GPU {self.gpu}'})"

    @property
    def waits_for_message(self) -> bool:
        return self.waits and any(MESSAGES in function for function, _ in self.stack)

    @property
    def at(self) -> str:
        return f"{self.words}{f' ({self.line})' if self.line else ''}"


def who_did_not_come(places: Sequence[Place], ranks: int) -> tuple[list[int], str]:
    """The ranks that the others wait for, and in words why.

    Args:
        places: of the ranks that have written down where they are.
        ranks: of the run.
    """
    silent = [rank for rank in range(ranks) if rank not in {place.rank for place in places if place.stuck}]
    known = {place.rank: place for place in places}
    if silent:
        names = [known[rank].name if rank in known else f"rank {rank}" for rank in silent]
        those = "they make" if len(silent) > 1 else "it makes"
        why = f"{_list(names)} did not come: {those} no sign. Has a process ended, was it stopped, is a machine gone?"
        return silent, f"{why} The others: {_others(places, silent)}"
    if len(places) == 1:
        return [places[0].rank], f"{places[0].name} is at {places[0].at}"
    late, how = late_ones(places)
    if not late:
        waiting = all(place.waits for place in places)
        doing = "wait in collectives" if waiting else "do the same"
        hint = "does the network work, do their shapes agree?" if waiting else "what do they wait for?"
        if len({place.at for place in places}) > 1:
            return [], f"no rank is behind the others: {_others(places, [])}; {hint}"
        return [], f"all ranks {doing} at {places[0].at}; {hint}"
    who = [place.rank for place in late]
    return who, f"{_list([f'{p.name} {how}: it is at {p.at}' for p in late])}. The others: {_others(places, who)}"


def late_ones(places: Sequence[Place]) -> tuple[list[Place], str]:
    """Those that the others wait for, and how that came about; none where nothing tells them apart."""
    waits = who_waits(places)
    ends = ends_of_chains(places, waits)
    ends = [place for place in ends if not place.waits_for_message] or ends
    apart = [place for place in ends if not place.waits]
    orders = [place.order for place in ends]
    if apart and (len(apart) < len(places) or min(orders) != max(orders)):
        late = [place for place in apart if place.order == min(p.order for p in apart)]
        on_device = [q for q in places if not q.waits and waits[q.rank].intersection(p.rank for p in late)]
        beside = any((p.order, p.stack) == (q.order, q.stack) for p in late for q in on_device)
        return late, LEFT_OUT if beside else NOT_COME
    if not apart and ends[0].waits_for_message:  # the program's order tells nothing between stages
        return (ends, MESSAGE) if len(ends) < len(places) else ([], "")
    if not apart:
        if len(ends) == 1:
            return ends, LEFT_OUT
        waited_for = [p for p in ends if any(p.rank in waits[q.rank] and _in_program(p, q) > 0 for q in ends)]
        for ahead in (waited_for, furthest(ends)):
            if ahead and len(ahead) < len(ends):
                if 2 * len(ahead) > len(ends):
                    return [place for place in ends if place not in ahead], PASSED
                return ahead, LEFT_OUT
        if len(ends) < len(places):
            return ends, ENDLESS
    return [], ""


def who_waits(places: Sequence[Place]) -> dict[int, set[int]]:
    """For each rank those that have not begun a collective that it has. On a GPU a stack does not show who waits, so
    any rank may; elsewhere only one that is in a collective does. Not for whom it is that a pipeline stage waits."""
    may = [p for p in places if (p.waits or p.gpu is not None) and not p.waits_for_message]
    waits: dict[int, set[int]] = {place.rank: set() for place in places}
    for group in {name for place in may for name in place.collectives}:
        counts = {place.rank: place.collectives[group] for place in places if group in place.collectives}
        least = min(counts.values())
        for place in may:
            if counts.get(place.rank, least) > least:
                waits[place.rank] |= {rank for rank, count in counts.items() if count < counts[place.rank]}
    return waits


def ends_of_chains(places: Sequence[Place], waits: Mapping[int, set[int]]) -> list[Place]:
    """Those that wait for nobody, or only for ranks that wait for them in turn, by way of others too.

    Args:
        waits: from `who_waits`.
    """
    after = {rank: sum(1 << other for other in others) for rank, others in waits.items()}  # sets as bits: there are
    for middle in waits:  # up to thousands of ranks
        for rank in waits:
            if after[rank] >> middle & 1:
                after[rank] |= after[middle]
    return [p for p in places if all(after[other] >> p.rank & 1 for other in after if after[p.rank] >> other & 1)]


def furthest(places: Sequence[Place]) -> list[Place]:
    """Those that no other is ahead of: by the part of the work; within one by where the calls on their stacks part, of
    which the later line of a function is taken to be ahead; and at one line by having begun fewer collectives."""
    first = functools.reduce(lambda a, b: b if _ahead(b, a) > 0 else a, places)
    return [place for place in places if _ahead(place, first) == 0]


def _ahead(a: Place, b: Place) -> int:
    """Above 0 if `a` is ahead of `b`, below 0 if it is behind it, else 0."""
    return _in_program(a, b) or sum(
        b.collectives[group] - a.collectives[group] for group in a.collectives.keys() & b.collectives.keys()
    )


def _in_program(a: Place, b: Place) -> int:
    """The same by the program's order alone."""
    if a.order != b.order:
        return 1 if a.order > b.order else -1
    for (function, line), (other, other_line) in zip(a.stack, b.stack, strict=False):
        if function != other:
            break
        if line != other_line:
            return line - other_line
    return 0


def begun_collectives() -> dict[str, int]:
    """How many collectives this process has begun in each of its process groups, by torch's name of the group."""
    if (c10d := sys.modules.get("torch.distributed.distributed_c10d")) is None:
        return {}
    return {name: group._get_sequence_number_for_group() for group, name in dict(c10d._world.pg_names).items()}


def _others(places: Sequence[Place], who: Sequence[int]) -> str:
    """Where the rest is, in words; of many at one place the first is named."""
    rest: dict[str, list[int]] = {}
    for place in places:
        if place.rank not in who:
            rest.setdefault(place.at, []).append(place.rank)
    named = [
        f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:4]))}{' ...' if len(numbers) > 4 else ''} "
        f"at {at}"
        for at, numbers in rest.items()
    ]
    return _list(named) if named else "none"


def _list(words: Sequence[str]) -> str:
    more = f" and {len(words) - 4} more" if len(words) > 4 else ""
    return "; ".join(words[:4]) + more
