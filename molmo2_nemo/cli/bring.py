"""`molmo2 prepare --needs` and `--fetch`: what published data sets need beyond their rows, and bringing it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molmo2_nemo.cli.options import check_file
from molmo2_nemo.errors import UserError, nearest

ONLY_HERE = {"needs_out": None, "catalogue": None}  # options of --needs and --fetch -> default
FEW = 6  # data sets of which the table shows addresses and targets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("what must be brought first (published data sets; also GROUP or all)")
    group.add_argument("--needs", action="store_true", help="show what the data sets named need, and how it is brought")
    group.add_argument(
        "--needs-out", metavar="FILE", help="also write it as .csv or .json, with addresses and licences"
    )
    group.add_argument("--catalogue", metavar="FILE.yaml", help="other addresses (mirrors) and data sets of your own")


def refuse_alone(args: argparse.Namespace) -> None:
    """Refuses options of --needs and --fetch without these.

    Raises:
        UserError: names the option.
    """
    for name, default in ONLY_HERE.items():
        if getattr(args, name) != default:
            raise UserError(f"--{name.replace('_', '-')} belongs to --needs or --fetch, which is missing")


def run(args: argparse.Namespace, recipe_names: Callable[[str], list[str]]) -> int:
    """Show the needs of the data sets named.

    Raises:
        UserError: no names, unknown ones, an unusable folder or file.
    """
    from data_prep.bringing.catalogue import load
    from data_prep.bringing.needs import check_name, details, needs_of, table, write

    if args.list:
        raise UserError("--list and --needs are two commands: give one of them")
    if args.needs_out:
        check_name(Path(args.needs_out))
        check_file("--needs-out", Path(args.needs_out))
    catalogue = load(Path(args.catalogue) if args.catalogue else None)
    sources = wanted(args.what, recipe_names)
    needs = needs_of(sources, catalogue, _folder(args))
    print("\n".join(table(needs) + (details(needs) if len(sources) <= FEW else [])))
    if args.needs_out:
        write(needs, Path(args.needs_out))
        print(f"{args.needs_out}: {len(needs):,} lines")
    return 0


def wanted(words: list[str], recipe_names: Callable[[str], list[str]]) -> list[Any]:
    """Published data sets: by name, by the group of a mixture, those of `recipe=NAME`, or `all`; each once.

    Args:
        recipe_names: the data sets of a `recipe=NAME`.

    Raises:
        UserError: nothing named, or an unknown name.
    """
    from data_prep.sources import all_sources, find_source

    if not words:
        raise UserError(
            "name data sets, a group such as tracking, recipe=4b, or all; molmo2 prepare --list shows names"
        )
    sources = all_sources()
    names = {*sources, *(s.published_as for s in sources.values() if s.published_as)}
    groups = {group for source in sources.values() for group in source.mixes.values()}
    found: dict[str, Any] = {}
    for word in words:
        if word == "all":
            found.update(sources)
        elif word in groups:
            found.update({name: source for name, source in sources.items() if word in source.mixes.values()})
        elif word.startswith("recipe="):
            found.update({name: sources[name] for name in recipe_names(word)})
        elif "/" in word or "=" in word or Path(word).suffix in (".jsonl", ".json"):
            raise UserError(
                f"{word}: --needs and --fetch are about published data sets; your own files name their media"
            )
        elif word in names:
            source = find_source(word)
            found[source.name] = source
        else:
            close = nearest(word, [*names, *groups, "all"])
            known = close if close.startswith("did you mean") else f"groups: {', '.join(sorted(groups))}, all"
            raise UserError(f"no data set or group {word!r}; {known}; molmo2 prepare --list shows all data sets")
    return list(found.values())


def _folder(args: argparse.Namespace) -> Path | None:
    """The first --source."""
    for folder in args.source:
        if not Path(folder).is_dir():
            raise UserError(f"--source {folder}: no such folder")
    return Path(args.source[0]) if args.source else None
