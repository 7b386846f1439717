"""`molmo2 prepare --list`: a table of all data sets, and the details of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_prep.sources import validation
from data_prep.sources.base import Hub, Source
from data_prep.sources.schema import describe
from molmo2_nemo.data.coverage import PUBLISHED

WHOLE = 150  # columns that all of the table takes


def table(sources: Sequence[Source], width: int) -> Any:
    """A table of all data sets, with remarks on names; where there is little room, without their kinds and licences.

    Args:
        width: in characters.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 1, 0, 0), width=width if width >= WHOLE else None)
    whole = ("data set", "stage 1", "SFT", "kind", "from", "licence")
    for title in whole if width >= WHOLE else ("data set", "stage 1", "SFT", "from"):
        made.add_column(title, overflow="fold", no_wrap=title == "data set")
    for source in sources:
        name = source.name + ("" if source.resolvable else " *")
        groups = [source.mixes.get(stage, "") for stage in ("pretrain", "sft")]
        if width >= WHOLE:
            made.add_row(name, *groups, source.kind, place(source), short_licence(source.licence))
        else:
            made.add_row(name, *groups, "hand" if "(hand)" in place(source) else "Hub")
    hand = "(hand): some files" if width >= WHOLE else "hand: files"
    notes = [
        f"Stages 2 and 3 share the SFT mixture. {hand} must be downloaded by hand; "
        "molmo2 prepare --list NAME says which, and where to put them."
    ]
    if width < WHOLE:
        notes.append(f"Kinds and licences are shown in {WHOLE} columns (COLUMNS={WHOLE} molmo2 prepare --list).")
    for source in sources:
        if source.published_as:
            missing = ", a name that the released registry cannot resolve" if not source.resolvable else ""
            star = "" if source.resolvable else "* "
            notes.append(f"{star}{source.name} stands for {source.published_as} of the released mixture{missing}")
        elif not source.resolvable:
            notes.append(f"* {source.name}: the released registry cannot resolve this name")
    return Group(made, *(Text(note) for note in notes))


def place(source: Source) -> str:
    """The origin of a data set, in a few words."""
    origin = source.origin
    if isinstance(origin, Hub):
        return origin.repo + (" (hand)" if origin.media else "")
    return "(hand)"


def details(source: Source) -> str:
    """Everything about one data set, as text."""
    origin = source.origin
    lines = [source.name, f"  kind       {source.kind}"]
    for stage, group in source.mixes.items():
        lines.append(f"  mixture    {stage}: {group}")
    if source.published_as:
        state = "" if source.resolvable else ", which the released registry cannot resolve"
        lines.append(f"  published  as {source.published_as}{state}")
    elif not source.resolvable:
        lines.append("  published  under this name, which the released registry cannot resolve")
    if source.counts_as != 1:
        lines.append(f"  length     the mixture counts each record as {source.counts_as} examples")
    lines.append(f"  licence    {source.licence}")
    if isinstance(origin, Hub):
        configs = f", configurations {', '.join(origin.configs)}" if origin.configs else ""
        lines.append(f"  from       Hugging Face: {origin.repo}{configs}, split {origin.split}")
        lines.append(f"             or a copy of it: --source DIR with DIR/{origin.repo.rpartition('/')[2]}/...")
        if origin.media:
            lines.append(f"  by hand    below --source: {origin.media}")
    else:
        lines.append(f"  by hand    {origin.fetch}")
        lines += [f"  file       {where.path}{_fetched(where)}" for where in origin.tables]
        lines += [f"  media      {media}" for media in origin.media]
    if source.name in PUBLISHED:
        size = PUBLISHED[source.name]
        lines.append(f"  size       {size.records:,} records ({size.source})")
    if source.name in validation.names():
        lines.append(f"  validation --split validation, to {source.name}-validation; {_validation_from(source)}")
    lines.append("  columns")
    lines += [f"    {name}: {describe(kind)}" for name, kind in source.fields.items()]
    if source.notes:
        lines.append(f"  notes      {source.notes}")
    return "\n".join(lines)


def _validation_from(source: Source) -> str:
    """Where the validation split's rows are."""
    origin = validation.origin_of(source)
    if isinstance(origin, Hub):
        configs = f"configuration {', '.join(origin.configs)}, " if origin.configs else ""
        other = origin != source.origin
        return f"from {configs}split {origin.split}" if other else "what training leaves out of the same rows"
    if origin == source.origin:
        return "what training leaves out of the same file"
    return f"from {', '.join(table.path for table in origin.tables)}"


def _fetched(where: Any) -> str:
    if where.repo:
        return f" (or from Hugging Face: {where.repo})"
    return " (or downloaded)" if where.url else ""


def short_licence(licence: str) -> str:
    """The first clause of a licence, which is about the annotations; `details` shows all of it."""
    for end in (";", "(", ","):
        licence = licence.partition(end)[0]
    return licence.strip()
