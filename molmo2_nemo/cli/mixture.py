"""Print the mixture: which data sets it has, the share of each, and its settings. Shards need not be there.

Shares inside a group follow from the numbers of records. Where a set without shards has to be counted for that, the
shares of its group's members are shown as "?"; the group's own share is always known. With data.missing=skip the table
shows the run that leaves missing sets out."""

from __future__ import annotations

import argparse
from typing import Any

from molmo2_nemo.errors import UserError

EXAMPLES = """\
examples:
  molmo2 mixture recipe=8b stage=sft
  molmo2 mixture recipe=8b stage=sft data.root=/data/shards data.missing=skip
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example recipe=8b stage=sft")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own configurations, laid out like conf/")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from molmo2_nemo.settings.compose import compose

    data = compose(args.overrides, args.config_dir).data
    if not data.sources:
        raise UserError("data.sources is empty: there is no mixture; take recipe=tiny, or add your own data sets")
    console = Console(highlight=False)
    for part in render(data):
        console.print(part)
    return 0


def render(data: Any) -> list[Any]:
    """The table and remarks for a `DataConfig`, at most 80 columns wide."""
    from rich.table import Table
    from rich.text import Text

    from molmo2_nemo.data.objects.files import use
    from molmo2_nemo.data.sampling import NO_GROUP, group_shares, mixture_table

    use(data.store)
    rows = mixture_table(data.sources, data.groups, data.missing)
    shares = group_shares(data.sources, data.groups, data.missing)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("data set", overflow="fold", max_width=45)
    for name in ("records", "rate", "share", "loss", "hires"):
        table.add_column(name, justify="right", no_wrap=True)
    grouped = set(shares) - {NO_GROUP} or any(row.group != NO_GROUP for row in rows)
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        if grouped:
            title = f"{group}, {len(members)} set{'s' * (len(members) > 1)}" if group != NO_GROUP else "no group"
            rate = "" if group == NO_GROUP else f"{data.groups.get(group, 0):g}"
            table.add_row(title, "", rate, f"{shares.get(group, 0):.3%}", style="bold")
        for row in members:
            table.add_row(*_cells(row, data.sources[row.name], " " if grouped else ""), style=_style(row))
    absent = [row.name for row in rows if row.missing and data.sources[row.name].rate > 0]
    notes = ["rate: of a member, the factor on its size. ~: a size set in place of the records."] if grouped else []
    if any(source.weight is not None or source.p_high_res is not None for source in data.sources.values()):
        notes.append("loss: weight of every answer token. hires: chance of up to 24 tiles.")
    if absent:
        cure = "left out" if data.missing == "skip" else "an error, unless data.missing=skip"
        notes.append(f"{len(absent)} of {len(rows)} data sets have no shards (records: -): {cure}")
    return [table, *(Text(note) for note in notes)]


def _cells(row: Any, source: Any, indent: str) -> tuple[str, ...]:
    records = "-" if row.records is None else f"{row.records:,}"
    if source.size_factor is not None and source.size_factor >= 1 and source.group is not None:
        records = f"~{source.size_factor:,.0f}"
    share = "?" if row.share is None else f"{row.share:.3%}"
    return (
        indent + row.name,
        records,
        f"{source.rate:g}",
        share,
        "" if source.weight is None else f"{source.weight:g}",
        "" if source.p_high_res is None else f"{source.p_high_res:g}",
    )


def _style(row: Any) -> str:
    return "dim" if row.missing else ""
