"""`molmo2 prepare --needs` and `--fetch`: what published data sets need beyond their rows, and bringing it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molmo2_nemo.cli.options import check_file, check_folder, check_numbers
from molmo2_nemo.errors import USER_ERROR, UserError, nearest, plural

ONLY_HERE = {  # options of --needs and --fetch -> default
    **{"needs_out": None, "catalogue": None, "project": None, "keep_archives": False, "parallel": 4, "per_host": 2},
}
FEW = 6  # data sets of which the table shows addresses and targets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("what must be brought first (published data sets; also GROUP or all)")
    group.add_argument("--needs", action="store_true", help="show what the data sets named need, and how it is brought")
    group.add_argument(
        "--needs-out", metavar="FILE", help="also write it as .csv or .json, with addresses and licences"
    )
    group.add_argument("--fetch", action="store_true", help="bring what may be fetched to the folder --source")
    group.add_argument("--project", metavar="ID", help="your Google Cloud project, for buckets whose reader pays")
    group.add_argument("--parallel", type=int, default=4, metavar="N", help="files brought at once (default 4)")
    group.add_argument("--per-host", type=int, default=2, metavar="N", help="connections to one host (default 2)")
    group.add_argument("--keep-archives", action="store_true", help="do not remove archives that were unpacked")
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
    """Show the needs of the data sets named, or bring them.

    Raises:
        UserError: no names, unknown ones, an unusable folder or file.
    """
    from data_prep.bringing.catalogue import load
    from data_prep.bringing.needs import check_name, details, needs_of, table, write

    if args.list:
        raise UserError("--list, --needs and --fetch are different commands: give one of them")
    if args.fetch and args.needs:
        raise UserError("--needs shows, --fetch brings: give one of them")
    if args.out:
        raise UserError("--out belongs to preparing; --needs and --fetch make no shards: leave it out")
    if args.needs_out:
        check_name(Path(args.needs_out))
        check_file("--needs-out", Path(args.needs_out))
    catalogue = load(Path(args.catalogue) if args.catalogue else None)
    sources = wanted(args.what, recipe_names)
    if args.fetch:
        return _fetch(args, sources, catalogue)
    needs = needs_of(sources, catalogue, _folder(args))
    print("\n".join(table(needs) + (details(needs) if len(sources) <= FEW else [])))
    if args.needs_out:
        write(needs, Path(args.needs_out))
        print(f"{args.needs_out}: {plural(len(needs), 'line')}")
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


def _fetch(args: argparse.Namespace, sources: list[Any], catalogue: Any) -> int:
    """Bring what may be fetched; the summary says what came, what did not, and what remains to be done.

    Raises:
        UserError: no folder, one that cannot be written, a full disk.
    """
    from rich.console import Console

    from data_prep.bringing.fetch import BROUGHT, FAILED, MAX_BYTES, THERE, Fetcher
    from data_prep.bringing.journal import WORK, alone
    from data_prep.bringing.show import Show
    from data_prep.bringing.videos import report
    from data_prep.download import Downloader

    check_numbers(args, {"parallel": 1, "per_host": 1, "rate": 0})
    root = _root(args)
    with alone(root), Show(Console(stderr=True, highlight=False)) as show:
        downloader = Downloader(
            root / WORK / "downloads",
            max_bytes=MAX_BYTES,
            rate=args.rate,
            per_host=args.per_host,
            dead_after=3,
            remember_gone=False,
            watch=show.came,
        )
        fetcher = Fetcher(root, downloader, catalogue, args.parallel, args.keep_archives, show.begun, show.ended)
        results = fetcher.bring(catalogue.of([source.name for source in sources]))
    failed = [result for result in results if result.state == FAILED]
    came = [result for result in results if result.state == BROUGHT]
    size = sum(result.size for result in came)
    there = sum(result.state == THERE for result in results)
    brought = f"{plural(len(came), 'file')}, {size / 1e9:,.2f} GB"
    print(f"{root}: brought {brought}; {there:,} there already; {len(failed):,} failed")
    for result in failed:
        print(f"  {result.name}: {result.detail}")
    for host, why in downloader.dead.items():
        print(f"  {host} was given up: {why}")
    for source in sources:
        if catalogue.sets.get(source.name):
            print("\n".join(report(source, root, catalogue, downloader, args.project)))
        else:
            print(f"{source.name}: molmo2 prepare brings everything")
    return USER_ERROR if failed else 0


def _root(args: argparse.Namespace) -> Path:
    """The folder that everything is brought to, made if it is not there.

    Raises:
        UserError: none or several given, or it cannot be written.
    """
    if len(args.source) != 1:
        raise UserError("--fetch needs one --source ROOT: the folder that everything is brought to")
    root = Path(args.source[0])
    check_folder("--source", root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--source {root} cannot be made: {error.strerror}") from None
    if not os.access(root, os.W_OK):
        raise UserError(f"--source {root}: it cannot be written there")
    return root
