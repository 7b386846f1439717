"""`molmo2 prepare --needs`: what must be brought for data sets, as a table, CSV or JSON."""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from data_prep.bringing.catalogue import FETCHED, WAYS, Catalogue, Item
from data_prep.official_layout import source_folders
from data_prep.sources.base import Hub, Source
from molmo2_nemo.errors import UserError
from molmo2_nemo.files import atomic

WIDTH = 80  # columns of the table
NAME, ENDS = 26, (17, 6)  # columns of the data set's name; of `how` and GB
ALONE = "prepare"  # `how` of data sets that need nothing beyond their rows
WORDS = {**WAYS, ALONE: "prepare alone"}


@dataclass(frozen=True)
class Need:
    """One line of the table: one thing that one data set needs."""

    data_set: str
    item: str  # name in the catalogue; "" where nothing is needed
    what: str
    how: str
    address: str
    target: str  # below --source
    count: int | None  # files, where published
    gb: float | None  # 10**9 bytes to transfer, where published
    licence: str
    form: str
    after: str
    rows: str  # where the rows (questions, captions) come from
    state: str  # "there" or "missing" below --source; "" without --source


def needs_of(sources: Sequence[Source], catalogue: Catalogue, folder: Path | None = None) -> list[Need]:
    """Every need of these data sets, in their order.

    Args:
        folder: --source, to see what is there.
    """
    found: list[Need] = []
    for source in sources:
        items = catalogue.of([source.name])
        found += [_need(source, item, folder) for item in items] or [_alone(source)]
    return found


def _need(source: Source, item: Item, folder: Path | None) -> Need:
    return Need(
        data_set=source.name,
        item=item.name,
        what=item.what,
        how=item.how,
        address=item.address(),
        target=item.target(),
        count=item.count,
        gb=item.gb,
        licence=item.licence,
        form=item.form,
        after=item.after,
        rows=rows_from(source),
        state="" if folder is None else "there" if _found(source, item, folder) else "missing",
    )


def _found(source: Source, item: Item, root: Path) -> bool:
    """Whether an item is there, in our folders or in those of the published code."""
    folders = source_folders((root,), source.name)
    tails = [path.removeprefix(f"{source.name}/") for path in item.there]
    return is_there(item, root) or (bool(tails) and all(any(filled(f / tail) for f in folders) for tail in tails))


def _alone(source: Source) -> Need:
    """The line of a data set of which `molmo2 prepare` brings everything."""
    from_web = "pixmo" in source.name
    what = "rows; each image from its site" if from_web else "rows, with everything that belongs to them"
    rows, licence = rows_from(source), source.licence
    return Need(source.name, "", what, ALONE, rows, "", None, None, licence, "", "", rows, "")


def rows_from(source: Source) -> str:
    """Where the rows of a data set come from."""
    origin = source.origin
    if isinstance(origin, Hub):
        return f"hf://datasets/{origin.repo}"
    places = [f"hf://datasets/{table.repo}" if table.repo else table.url for table in origin.tables]
    return " ".join(dict.fromkeys(filter(None, places))) or "brought with the media"


def is_there(item: Item, folder: Path) -> bool:
    """All paths that an item fills exist, and folders among them hold something."""
    return bool(item.there) and all(filled(folder / path) for path in item.there)


def filled(path: Path) -> bool:
    """A file, or a folder that holds something."""
    try:
        return path.is_file() or (path.is_dir() and any(path.iterdir()))
    except OSError:
        return False


# --- output ----------------------------------------------------------------------------------------------------------


def table(needs: Sequence[Need]) -> list[str]:
    """Lines of at most 80 columns: a row per need, and totals."""
    with_state = any(need.state for need in needs)
    widths = [NAME, WIDTH - NAME - sum(w + 1 for w in ENDS) - 1 - 6 * with_state, *ENDS] + [5] * with_state
    titles = ["data set", "what must be brought", "how", "GB", "there"]
    lines = [_line(titles, widths)]
    for name, *cells in _rows(needs):
        if len(name) > NAME:
            lines.append(name)
            name = ""
        texts = textwrap.wrap(cells[0], widths[1])
        lines.append(_line([name, texts[0], *cells[1:]], widths))
        lines += [_line(["", text], widths) for text in texts[1:]]
    return [*lines, "", *(line for total in totals(needs) for line in textwrap.wrap(total, WIDTH))]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells beside each other; the fourth, a number, to the right."""
    pairs = enumerate(zip(cells, widths, strict=False))
    return " ".join(f"{cell:>{width}}" if place == 3 else f"{cell:<{width}}" for place, (cell, width) in pairs).rstrip()


def _rows(needs: Sequence[Need]) -> Iterator[tuple[str, ...]]:
    """The cells of the table. A data set that needs the same as an earlier one refers to it."""
    first_with: dict[tuple[str, ...], str] = {}  # items -> the data set that they were shown for
    for name, group in groupby(needs, key=lambda need: need.data_set):
        these = list(group)
        items = tuple(need.item for need in these)
        earlier = first_with.setdefault(items, name) if items != ("",) else name
        if earlier != name:
            yield name, f"as for {earlier}", WORDS[these[0].how] if len(these) == 1 else "", "", ""
            continue
        for place, need in enumerate(these):
            state = {"there": "yes", "missing": "no"}.get(need.state, "")
            yield "" if place else name, need.what, WORDS[need.how], _gb(need.gb), state


def details(needs: Sequence[Need]) -> list[str]:
    """Lines with the address, the target, the licence and the form of everything that must be brought, each once."""
    lines = []
    for need in {need.item: need for need in needs if need.item}.values():
        lines += [
            "",
            need.what,
            f"  from     {need.address}",
            f"  to       {need.target}",
            f"  licence  {need.licence}",
        ]
        lines += [f"  form     {need.form}"] if need.form else []
        lines += [f"  files    {need.count:,}"] if need.count else []
        lines += [f"  then     {need.after}"] if need.after else []
    return lines


def _gb(gb: float | None) -> str:
    return "" if gb is None else f"{gb:,.1f}"


def totals(needs: Sequence[Need]) -> list[str]:
    """The lines below the table: what each way brings, and what cannot be had."""
    lines = []
    once = {need.item or need.data_set: need for need in needs}.values()
    for how, words in WORDS.items():
        these = [need for need in once if need.how == how]
        if not these:
            continue
        sets = len({need.data_set for need in needs if need.how == how})
        known = [need.gb for need in these if need.gb is not None]
        size = f", {sum(known):,.0f} GB where published ({len(known)} of {len(these)})" if known else ""
        sets_word = "data set" if sets == 1 else "data sets"
        things = f"{len(these)} {'thing' if len(these) == 1 else 'things'} " if how != ALONE else ""
        lines.append(f"{words}: {things}for {sets} {sets_word}{size}")
    nobody = list(dict.fromkeys(need.data_set for need in needs if need.how == "nobody"))
    if nobody:
        lines.append(f"Nobody can have all of today: {', '.join(nobody)}")
    if any(need.how in FETCHED for need in needs):
        lines.append("molmo2 prepare --fetch NAME... --source ROOT brings what is fetched.")
    return lines


def check_name(path: Path) -> None:
    """Refuses a name that says neither CSV nor JSON.

    Raises:
        UserError: another suffix.
    """
    if path.suffix.lower() not in (".csv", ".json"):
        raise UserError(f"--needs-out {path}: give a name that ends in .csv or .json")


def write(needs: Sequence[Need], path: Path) -> None:
    """The needs as a .csv or .json file, with every column.

    Raises:
        UserError: it cannot be written.
    """
    rows = [asdict(need) for need in needs]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as part, part.open("w", newline="") as file:
            if path.suffix.lower() == ".json":
                json.dump(rows, file, indent=1)
            else:
                writer = csv.DictWriter(file, fieldnames=list(Need.__dataclass_fields__))
                writer.writeheader()
                writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--needs-out {path} cannot be written: {error.strerror or error}") from None
