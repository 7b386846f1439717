"""Print the mixture: which data sets it has, the share of each, and its settings. Shards need not be there.

Shares inside a group follow from the numbers of records. Where a set without shards has to be counted for that, the
shares of its group's members are shown as "?"; the group's own share is always known. With data.missing=skip the table
shows the run that leaves missing sets out.

Epochs are passes over a set in the whole run: examples drawn of it over its records. A second table has them, and how
much of each set is there; where few records stand in for many, a warning in red says so."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from molmo2_nemo.cli.options import add_config_dir_arguments
from molmo2_nemo.errors import UserError

if TYPE_CHECKING:
    from molmo2_nemo.data.coverage import Coverage

EXAMPLES = """\
examples:
  molmo2 mixture recipe=8b stage=sft
  molmo2 mixture recipe=8b stage=sft data.root=/data/shards data.missing=skip
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example recipe=8b stage=sft")
    add_config_dir_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from molmo2_nemo.settings.compose import compose

    cfg = compose(args.overrides, args.config_dir, args.config_name)
    data = cfg.data
    if not data.sources:
        raise UserError("data.sources is empty: there is no mixture; take recipe=tiny, or add your own data sets")
    console = Console(highlight=False)
    for part in render(data, cfg.stage.max_steps * cfg.stage.global_batch_size):
        console.print(part)
    return 0


def render(data: Any, packs: int = 0) -> list[Any]:
    """The table and remarks for a `DataConfig`, at most 80 columns wide; `packs`: of the whole run, 0: no epochs."""
    from rich.table import Table
    from rich.text import Text

    from molmo2_nemo.data.objects.files import use
    from molmo2_nemo.data.sampling import NO_GROUP, group_shares, looked_for, mixture_table

    use(data.store)
    rows = mixture_table(data.sources, data.groups, data.missing)
    shares = group_shares(data.sources, data.groups, data.missing)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("data set", overflow="fold", max_width=45)
    for name in ("records", "rate", "share", "loss", "hires"):
        table.add_column(name, justify="right", no_wrap=True)
    present = {row.name: Present.of(row.name, data.sources[row.name]) for row in rows if not row.missing}
    each = per_pack(rows, present, data)
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
        where = looked_for(data.root, data.sources)
        notes.append(f"{len(absent)} of {len(rows)} data sets have no shards (records: -): {cure}{where}")
    if packs and present:
        notes.append(f"epochs: {packs:,} packs of about {each:.1f} examples, by share, over the records.")
    found = [_found(rows, present, packs * each)] if present else []
    return [table, *(Text(note) for note in notes), *found, *_warnings(present, data)]


@dataclass(frozen=True)
class Present:
    """What is known of a data set that has shards."""

    cover: Coverage
    size: tuple[float, float] | None  # mean tokens and crops of a record

    @classmethod
    def of(cls, name: str, source: Any) -> Present:
        from molmo2_nemo.data.coverage import coverage, mean_sizes
        from molmo2_nemo.data.shards import ShardDataset

        dataset = ShardDataset(source.path, name)
        try:
            return cls(coverage(name, dataset.manifest), mean_sizes(dataset.files.manifest()))
        finally:
            dataset.close()


def per_pack(rows: list[Any], present: dict[str, Present], data: Any) -> float:
    """Examples in a pack, from the records that are there."""
    from molmo2_nemo.data.coverage import examples_per_pack

    sizes = {name: one.size for name, one in present.items() if one.size is not None}
    return examples_per_pack(sizes, {row.name: row.share or 0.0 for row in rows}, data)


def _epochs(row: Any, draws: float) -> str:
    if not draws or not row.records or not row.share:
        return ""
    epochs = row.share * draws / row.records
    return "<0.1" if epochs < 0.1 else f"{epochs:,.1f}" if epochs < 100 else f"{epochs:,.0f}"


def _found(rows: list[Any], present: dict[str, Present], draws: float) -> Any:
    """A table of the data sets that are there: how often the run passes over them, how much of each is there."""
    from rich.table import Table

    from molmo2_nemo.data.coverage import percent

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("of those there", overflow="fold", max_width=45)
    for name in ("epochs", "share there", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.name in present:
            cover = present[row.name].cover
            there = "a part" if cover.limited and cover.share is None else ""
            there = there if cover.share is None else percent(cover.share)
            table.add_row(row.name, _epochs(row, draws), there, "" if cover.whole is None else f"{cover.whole:,}")
    return table


def _warnings(present: dict[str, Present], data: Any) -> list[Any]:
    from rich.text import Text

    from molmo2_nemo.data.coverage import standing_in

    thin = (standing_in(name, one.cover, data.sources[name]) for name, one in present.items())
    return [Text(f"warning: {words}", style="bold red") for words in thin if words]


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
