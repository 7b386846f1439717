"""Shares of the mixture's data sets: plain rates, or groups that divide a rate by the square root of their sizes.

This is the rule of the released Molmo2 mixtures. A group's rate is divided among its members by s * rate, where s is

    size_factor None:        sqrt(records)
    size_factor 0:           1
    size_factor in (0, 1):   sqrt(size_factor * records)
    size_factor >= 1:        sqrt(size_factor), an effective number of records

and all rates, including those of sources without a group, are divided by their sum at the end.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from molmo2_nemo.data.config import SourceConfig
from molmo2_nemo.data.manifest import MANIFEST, ShardError
from molmo2_nemo.data.objects.address import Address, place_of
from molmo2_nemo.data.objects.files import RemoteFiles
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.errors import DataError

NO_GROUP = "-"  # shown for sources outside every group


@dataclass(frozen=True, slots=True)
class Share:
    """One data set of the mixture, as `molmo2 mixture` prints it."""

    name: str
    group: str
    records: int | None  # None: it has no shards, or they did not need to be counted
    share: float | None  # of all examples; None: it depends on an unknown number of records
    missing: bool


def effective_size(size_factor: float | None, records: int | None) -> float | None:
    """s of the rule above; None when it needs a number of records that is not known.

    Raises:
        DataError: a size factor that is negative or not finite.
    """
    if size_factor is not None and (not math.isfinite(size_factor) or size_factor < 0):
        raise DataError(f"size_factor must be a finite number >= 0, not {size_factor}")
    if size_factor == 0:
        return 1.0
    if size_factor is not None and size_factor >= 1:
        return math.sqrt(size_factor)
    return None if records is None else math.sqrt((1.0 if size_factor is None else size_factor) * records)


def is_missing(source: SourceConfig) -> bool:
    """Whether a source has no shards at all. A damaged data set is not missing: opening it raises."""
    if not source.path:
        return True
    folder = place_of(source.path)
    if isinstance(folder, Address):
        try:
            return RemoteFiles(folder).is_empty()
        except ShardError:  # opening it says why
            return False
    return not (folder / MANIFEST).is_file() and not any(folder.glob("*.tar"))


def present(sources: Mapping[str, SourceConfig], missing: str) -> dict[str, SourceConfig]:
    """The sources that take part.

    Args:
        missing: "error", or "skip" to leave out those without shards.
    Raises:
        DataError: sources without shards, with "error" (the message names them); no source left, with "skip".
    """
    gone = [name for name, source in sources.items() if source.rate > 0 and is_missing(source)]
    if not gone:
        return dict(sources)
    if missing != "skip":
        places = "; ".join(f"{name} ({sources[name].path or 'no path'})" for name in gone[:5])
        more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
        raise DataError(
            f"{len(gone)} of {len(sources)} data sets have no shards: {places}{more}. Make them with molmo2 prepare "
            "(--list), set their path, or leave them out with data.missing=skip (the other rates grow to fill the gap)"
        )
    left = {name: source for name, source in sources.items() if name not in gone}
    if not left:
        raise DataError(f"none of the {len(sources)} data sets has shards (the first: {gone[0]}); nothing to train on")
    return left


def looked_for(root: str, sources: Mapping[str, SourceConfig]) -> str:
    """What the folder of published data sets is named with, for a message; "" where no source is in it."""
    if not any(source.path.startswith(f"{root}/") for source in sources.values()):
        return ""
    unset = "" if "MOLMO2_DATA" in os.environ else " (not set)"
    return f". They are looked for in data.root={root}, which MOLMO2_DATA{unset} names"


def count_records(name: str, source: SourceConfig) -> int:
    """Length of a data set as the mixture counts it, from its manifest: its records, or a multiple of them."""
    dataset = ShardDataset(source.path, name)
    dataset.close()
    return dataset.counted


def weights(
    sources: Mapping[str, SourceConfig],
    groups: Mapping[str, float],
    records: Callable[[str, SourceConfig], int | None] = count_records,
) -> dict[str, float | None]:
    """Unnormalised rate of each source; None where it is unknown. The values of a group sum to the group's rate.

    Raises:
        DataError: rates that are negative or not finite, a group that `groups` does not name.
    """
    for name, source in sources.items():
        if not math.isfinite(source.rate) or source.rate < 0:
            raise DataError(f"data.sources.{name}.rate must be a finite number >= 0, not {source.rate}")
        if source.group is not None and source.group not in groups:
            known = ", ".join(sorted(groups)) or "none"
            raise DataError(f"data.sources.{name}.group={source.group}: no such group in data.groups (known: {known})")
    for group, rate in groups.items():
        if not math.isfinite(rate) or rate < 0:
            raise DataError(f"data.groups.{group} must be a finite number >= 0, not {rate}")
    found: dict[str, float | None] = {name: s.rate for name, s in sources.items() if s.group is None}
    for group, rate in groups.items():
        members = {n: s for n, s in sources.items() if s.group == group}
        sizes = {n: _size(n, s, records) for n, s in members.items() if s.rate > 0}
        sure = [size for size in sizes.values() if size is not None]
        total = math.fsum(sure)
        for name, source in members.items():
            size = sizes.get(name, 0.0)
            if len(sure) < len(sizes) and source.rate > 0:
                found[name] = rate if len(sizes) == 1 else None
            else:
                found[name] = rate * size / total if size is not None and total > 0 else 0.0
    return found


def _size(name: str, source: SourceConfig, records: Callable[[str, SourceConfig], int | None]) -> float | None:
    try:
        size = effective_size(source.size_factor, None)
        if size is None:
            size = effective_size(source.size_factor, records(name, source))
    except DataError as error:
        raise DataError(f"data.sources.{name}: {error}") from None
    return None if size is None else size * source.rate


def mixture_table(
    sources: Mapping[str, SourceConfig], groups: Mapping[str, float], missing: str = "error"
) -> list[Share]:
    """Every source with its share, largest group first, whether or not its shards are there.

    With `missing="skip"` the shares are those of a run that leaves out the missing sources (whose shares are 0);
    otherwise those of the complete mixture, as far as they are known.
    """
    gone = {name for name, source in sources.items() if is_missing(source)}
    counts: dict[str, int | None] = {n: None if n in gone else count_records(n, s) for n, s in sources.items()}
    taking_part = {n: s for n, s in sources.items() if not (missing == "skip" and n in gone)}
    found = weights(taking_part, groups, lambda name, _: counts[name])
    # A group's rate counts in the sum even where its division among the members is not known.
    used = {s.group for s in taking_part.values() if s.group is not None and s.rate > 0}
    plain = [s.rate for s in taking_part.values() if s.group is None]
    total = math.fsum([*plain, *(groups[g] for g in used)])
    rows = []
    for name, source in sources.items():
        weight = found.get(name, 0.0)
        share = None if weight is None else weight / total if total > 0 else 0.0
        rows.append(Share(name, source.group or NO_GROUP, counts[name], share, name in gone))
    return rows


def group_shares(
    sources: Mapping[str, SourceConfig], groups: Mapping[str, float], missing: str = "error"
) -> dict[str, float]:
    """Share of each group (and of all sources outside groups together), summing to 1."""
    taking_part = {n: s for n, s in sources.items() if s.rate > 0 and not (missing == "skip" and is_missing(s))}
    found = {g: r for g, r in groups.items() if any(s.group == g for s in taking_part.values())}
    plain = math.fsum(s.rate for s in taking_part.values() if s.group is None)
    if plain > 0:
        found[NO_GROUP] = plain
    total = math.fsum(found.values())
    return {group: rate / total for group, rate in found.items()} if total > 0 else found
