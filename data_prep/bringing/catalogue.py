"""The catalogue: what each published data set needs, read from `catalogue.yaml` or a file of the user's own."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from molmo2_nemo.errors import UserError, nearest

OURS = Path(__file__).with_name("catalogue.yaml")
WAYS = {  # `how` of an item -> in words
    "fetch": "fetched",
    "hub": "fetched (Hub)",
    "bucket": "a bucket, you pay",
    "youtube": "yt-dlp, by ids",
    "hand": "by hand",
    "nobody": "hosted nowhere",
}
FETCHED = ("fetch", "hub")
NEEDED = {  # `how` -> fields that it must have
    "fetch": ("urls", "into"),
    "hub": ("repo", "files", "into"),
    "bucket": ("repo", "files", "into", "page"),
    "youtube": ("into", "page"),
    "hand": ("into", "page"),
    "nobody": ("page",),
}


@dataclass(frozen=True)
class Item:
    """One thing that data sets need; the head of catalogue.yaml explains the fields."""

    name: str
    what: str
    how: str
    licence: str
    urls: tuple[str, ...] = ()
    repo: str = ""
    files: tuple[str, ...] = ()
    page: str = ""
    into: str = ""
    inside: str = ""
    inside_if: str = ""  # as `inside`, but only where the archive has that folder
    flat: bool = False
    file: str = ""
    joined: bool = False
    nested: Mapping[str, str] = field(default_factory=dict)
    there: tuple[str, ...] = ()
    ids: bool = False  # YouTube ids of what is missing are written down
    two_fps: bool = False  # of a bucket: the copies at 2 frames per second are used
    count: int | None = None
    gb: float | None = None
    sha1: str = ""
    after: str = ""
    form: str = ""
    found_in: str = ""  # `from`

    def address(self) -> str:
        """Where it comes from, as one line."""
        if self.how == "fetch":
            return self.urls[0]
        if self.how == "hub":
            return f"hf://datasets/{self.repo}/{' '.join(self.files)}"
        return self.page

    def target(self) -> str:
        """The paths below --source that it fills."""
        return " ".join(self.there) or self.into


@dataclass(frozen=True)
class Catalogue:
    """Items by name, and the items of every data set."""

    items: Mapping[str, Item]
    sets: Mapping[str, tuple[str, ...]]

    def of(self, names: Iterable[str]) -> list[Item]:
        """The items of these data sets, each once."""
        return [self.items[name] for name in dict.fromkeys(item for name in names for item in self.sets.get(name, ()))]


@functools.cache
def load(path: Path | None = None) -> Catalogue:
    """The catalogue of this package, with items and sets of the user's file added or replaced.

    Args:
        path: a YAML file of the same form; an item there may give only the fields that differ, such as `urls`.
    Raises:
        UserError: the file cannot be read, or names unknown fields, ways or items.
    """
    items, sets = _read(OURS)
    if path is not None:
        own_items, own_sets = _read(path)
        items = {**items, **{name: {**items.get(name, {}), **given} for name, given in own_items.items()}}
        sets = {**sets, **own_sets}
    where = path or OURS
    made = {name: _item(where, name, given) for name, given in items.items()}
    for name, wanted in sets.items():
        for item in wanted:
            if item not in made:
                raise UserError(f"{where}, sets.{name}: no item {item!r}; {nearest(str(item), made)}")
    return Catalogue(made, {name: tuple(wanted) for name, wanted in sets.items()})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import yaml

    try:
        read = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--catalogue {path}: {' '.join(str(error).split())}") from None
    read = read if isinstance(read, dict) else {}
    items, sets = read.get("items") or {}, read.get("sets") or {}
    tables = isinstance(items, dict) and isinstance(sets, dict)
    if not read or set(read) - {"items", "sets"} or not tables or not all(isinstance(i, dict) for i in items.values()):
        raise UserError(f"{path}: expected `items:` and `sets:`, as in {OURS}")
    if not all(isinstance(wanted, list) for wanted in sets.values()):
        raise UserError(f"{path}: every entry of `sets:` is a list of items, as in {OURS}")
    return items, sets


def _item(path: Path, name: str, given: dict[str, Any]) -> Item:
    """An item with its fields checked.

    Raises:
        UserError: an unknown or missing field, an unknown way, a path that leads outside --source.
    """
    where, known = f"{path}, items.{name}", {f.name: f for f in fields(Item)}
    given = {"found_in" if key == "from" else key: value for key, value in given.items()}
    for key, value in given.items():
        if key not in known or key == "name":
            raise UserError(f"{where}: unknown field {key!r}; {nearest(key, known)}")
        if known[key].type == "str" and not isinstance(value, str):
            raise UserError(f"{where}, {key}: expected a text, in quotes if need be, not {value!r}")
    how = given.get("how")
    if how not in NEEDED:
        raise UserError(f"{where}: `how` is {how!r}; expected one of {', '.join(NEEDED)}")
    missing = [key for key in ("what", "licence", *NEEDED[how]) if not given.get(key)]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing, which how: {how} needs")
    for key in ("urls", "files", "there"):
        if key in given:
            given[key] = (given[key],) if isinstance(given[key], str) else tuple(given[key])
    made = Item(name=name, **given)
    nested = [*made.nested, *made.nested.values()]
    for inside in (made.into, made.file, *made.there, *nested):
        if inside.startswith("/") or ".." in PurePosixPath(inside).parts:
            raise UserError(f"{where}: the path {inside!r} leads outside --source")
    return made
