"""Turn data sets into shards for training: those of the published mixture by name, or your own files.

Interrupted? Run it again: it resumes where it stopped. Records that cannot be used are counted, and listed in
skipped.jsonl beside the shards. A data set appears in --out when it is complete; until then it is DIR/NAME.partial."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molmo2_nemo.cli import bring
from molmo2_nemo.cli.options import add_run_arguments, check_around, check_folder, check_numbers, run_settings
from molmo2_nemo.data.objects.address import is_url
from molmo2_nemo.errors import USER_ERROR, UserError, plural, show_error

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")  # of a data set of the user's own
EXAMPLES = """\
examples:
  molmo2 prepare --list                                     # every data set of the published mixture
  molmo2 prepare --list doc_qa                              # where its files come from and where they go
  molmo2 prepare pixmo_cap --out /data/shards --limit 1000
  molmo2 prepare doc_qa --source /data/raw --out /data/shards
  molmo2 prepare recipe=4b --source /data/raw --out /data/shards
  molmo2 prepare --needs okvqa star                         # what must be brought for them, and how
  molmo2 prepare --fetch okvqa --source /data/raw           # brings what may be fetched
  molmo2 prepare own.jsonl --out shards                     # your own images and videos: docs/data.md
  molmo2 prepare table.csv --map map.yaml --out shards      # a table, a JSON list, COCO, a folder of datasets
  molmo2 prepare laion/ --out shards                        # tars of img2dataset, Megatron-Energon, webdataset
  molmo2 prepare own.jsonl --out shards --hold-out 2%        # the rest, and own-validation
  molmo2 prepare own.jsonl --out shards --part 3/16         # on the third of 16 machines; then: molmo2 shards join
  molmo2 prepare own.jsonl --out shards --for recipe=8b stage=long    # checked as that run will read them
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", metavar="NAME|[NAME=]FILE|recipe=NAME", help="what to prepare")
    parser.add_argument(
        "--list", action="store_true", help="show the data sets that are known, or details of those named"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of all data sets; each gets a folder of its name there")
    parser.add_argument(
        "--source",
        metavar="DIR",
        action="append",
        default=[],
        help="folder of raw files; those of NAME are looked for in DIR/NAME, then in DIR (may be repeated)",
    )
    parser.add_argument("--name", metavar="NAME", help="the data set's name, of one file of your own (the file's)")
    parser.add_argument("--map", metavar="FILE", help="which column of your own files is what: YAML, field: column")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that fetch and decode (default: all cores; 0: this one)"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="stop after N samples of each data set")
    parser.add_argument(
        "--part",
        metavar="K/N",
        help="one data set over N machines: prepare part K of it (molmo2 shards join: the whole)",
    )
    parser.add_argument(
        "--split", choices=("train", "validation"), default="train", help="of published data sets; to NAME-validation"
    )
    parser.add_argument(
        "--hold-out", metavar="SHARE", help="of your own data, such as 2%%: by image or film, to NAME-validation"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices made here (default 0)")
    parser.add_argument(
        "--repeat-media",
        action="store_true",
        help="write a picture or film into every record that shows it, so that other tools can read record by record",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what was prepared with other settings")
    parser.add_argument("--strict", action="store_true", help="stop at the first sample that cannot be used")
    parser.add_argument(
        "--keep-going", action="store_true", help="do not give up where none of the first media is there or usable"
    )
    parser.add_argument("--cache", metavar="DIR", help="downloads and unpacked archives (default: OUT/.cache)")
    parser.add_argument("--rate", type=float, default=0.0, metavar="N", help="at most N downloads per second")
    parser.add_argument(
        "--shard-mb", type=int, default=1000, metavar="N", help="largest shard, megabytes (default 1000)"
    )
    parser.add_argument("--shard-records", type=int, default=10_000, metavar="N", help="most records of a shard")
    parser.add_argument("--max-media-mb", type=int, default=4096, metavar="N", help="largest image or video, megabytes")
    parser.add_argument(
        "--max-image-side",
        type=int,
        default=0,
        metavar="N",
        help="make pictures smaller whose longer side has more than N pixels, never below what the model reads",
    )
    parser.add_argument("--cut-clips", action="store_true", help="store only the clip of a video (not re-encoded)")
    parser.add_argument(
        "--video-height", type=int, default=0, metavar="N", help="re-encode videos higher than N pixels"
    )
    parser.add_argument(
        "--video-fps", type=float, default=0.0, metavar="N", help="re-encode videos faster than N frames/s"
    )
    parser.add_argument(
        "--gop",
        type=int,
        default=0,
        metavar="N",
        help="re-encode videos with more than N frames from one key frame to the next",
    )
    add_run_arguments(parser)
    bring.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.needs or args.fetch:
        return bring.run(args, _recipe_names)
    bring.refuse_alone(args)
    return _list(args.what) if args.list else _prepare(args)


def _list(names: list[str]) -> int:
    from rich.console import Console

    from data_prep import listing
    from data_prep.sources import all_sources, find_source

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if names:
        for name in names:
            console.print(listing.details(find_source(name)), soft_wrap=True)
        return 0
    console.print(listing.table(list(all_sources().values()), console.width))
    return 0


def _prepare(args: argparse.Namespace) -> int:
    if not args.what:
        raise UserError("nothing to prepare: name data sets, a recipe (recipe=4b) or a .jsonl file; --list shows names")
    if not args.out:
        raise UserError("--out DIR is missing: the folder that gets the shards")
    _check_options(args)

    from rich.console import Console

    from data_prep import prepare as work
    from data_prep.held_out import validation_source
    from data_prep.progress import RichProgress
    from data_prep.run_limits import in_words

    out, console = Path(args.out), Console(stderr=True, highlight=False)
    failed: list[str] = []
    wanted, config = _named(_wanted(args.what), args.name), run_settings(args)
    given = _map(args.map, wanted)
    share = _held_share(args, wanted)
    for what in wanted:
        name = what.name
        options = _options(args, name, out, config)
        try:
            if isinstance(what, OwnFile):
                found = _found(what.path, given)
                for side in _sides(options, share):
                    with RichProgress(console) as progress:
                        summary = _own_side(work, what.path, out / name, side, progress, found)
                    if summary is not None:
                        _report(summary, side.place(out / name))
            else:
                source = validation_source(what) if args.split == "validation" else what
                with RichProgress(console) as progress:
                    summary = work.prepare(source, out / name, options, progress=progress)
                _report(summary, options.place(out / name))
        except UserError as error:
            if len(wanted) == 1:
                raise
            show_error(error)
            failed.append(name)
    print(in_words(config))
    if failed:
        show_error(f"{len(failed)} of {len(wanted)} data sets could not be prepared: {', '.join(failed)}")
        return USER_ERROR
    return 0


def _held_share(args: argparse.Namespace, wanted: list[Any]) -> float | None:
    """The share of --hold-out.

    Raises:
        UserError: it is none, or --split or --hold-out is not for what is named.
    """
    from data_prep.held_out import HeldOut

    own = [what.name for what in wanted if isinstance(what, OwnFile)]
    if args.split == "validation" and own:
        raise UserError(
            f"--split validation is of published data sets; of your own ({own[0]}) hold a share out: --hold-out 2%"
        )
    if args.hold_out is not None and len(own) < len(wanted):
        published = next(what.name for what in wanted if not isinstance(what, OwnFile))
        raise UserError(f"--hold-out is of your own data; of {published} take its own: --split validation")
    return None if args.hold_out is None else HeldOut.parse(args.hold_out)


def _sides(options: Any, share: float | None) -> list[Any]:
    """The options of each data set that one's own file becomes: all of it, or two sides."""
    from data_prep.held_out import HeldOut

    if share is None:
        return [options]
    return [replace(options, held_out=HeldOut(share, held)) for held in (False, True)]


def _own_side(work: Any, path: Path, out: Path, options: Any, progress: Any, found: Any) -> Any:
    """What came of one's own file, or of a side of it; None where nothing was held out, which is said."""
    from data_prep.output import NoItems

    try:
        return work.prepare_own(path, out, options, progress, found)
    except NoItems:
        if options.held_out is None or not options.held_out.held:
            raise
        print(f"{options.place(out)}: nothing is held out: none of the images, films or texts falls into the share")
        return None


def _map(path: str | None, wanted: list[Any]) -> dict[str, Any] | None:
    """The map of --map, for the user's own files."""
    from data_prep.sources.own_columns import read_map
    from molmo2_nemo.errors import read_text

    if path is None:
        return None
    if not any(isinstance(what, OwnFile) for what in wanted):
        raise UserError("--map is for files of your own, and none is named")
    return read_map(read_text(Path(path)), path)


def _found(path: Path, given: dict[str, Any] | None) -> Any:
    """What there is to read; says what each column was taken for."""
    from data_prep.own_files import find_rows

    found = find_rows(path, given)
    if found.columns is not None:
        print(f"{path}: {found.kind}; its columns are taken for")
        print("\n".join(found.columns.lines()))
    for other in found.unread:
        print(f"  not read: {other}")
    return found


def _check_options(args: argparse.Namespace) -> None:
    least = {"limit": 0, "workers": 0, "rate": 0, "shard_mb": 1, "shard_records": 1, "max_media_mb": 1}
    check_numbers(args, least | {"video_height": 0, "video_fps": 0, "gop": 0, "seed": 0, "max_image_side": 0})
    if is_url(args.out):
        words = " ".join(args.what)
        raise UserError(
            f"prepare writes to a folder, and copying is a command of its own: molmo2 prepare {words} ... --out DIR; "
            f"molmo2 shards copy DIR {args.out}"
        )
    check_around("--out", Path(args.out))
    if args.cache:
        check_folder("--cache", Path(args.cache))
    for folder in args.source:
        if not Path(folder).is_dir():
            raise UserError(f"--source {folder}: no such folder")


@dataclass(frozen=True)
class OwnFile:
    """A user's own file or folder, and the name of the data set that it becomes."""

    path: Path
    name: str


def _wanted(words: list[str]) -> list[Any]:
    """Sources and the user's own files, in the order given, each once.

    Raises:
        UserError: an unknown name, two files that would become one data set.
    """
    from data_prep.sources import find_source

    found: list[Any] = []
    for word in words:
        if word.startswith("recipe="):
            found += [find_source(name) for name in _recipe_names(word)]
        else:
            found.append(_own_file(word) or find_source(word))
    by_name: dict[str, Any] = {}
    for what in found:
        other = by_name.setdefault(what.name, what)
        if other != what and OwnFile in (type(other), type(what)):
            names = [str(w.path) if isinstance(w, OwnFile) else f"the published {w.name}" for w in (other, what)]
            raise UserError(
                f"{names[0]} and {names[1]} would both become the data set {what.name}; name one apart: NAME=FILE (or "
                "--name NAME, in a command for one file)"
            )
    return list(by_name.values())


def _named(wanted: list[Any], name: str | None) -> list[Any]:
    """What to prepare, under the name of --name.

    Raises:
        UserError: it is not one file of the user's, or the name cannot be one.
    """
    if name is None:
        return wanted
    if len(wanted) != 1 or not isinstance(wanted[0], OwnFile):
        raise UserError("--name names the data set of one file of your own; of several, write NAME=FILE for each")
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: a name has letters, digits, and . _ - only")
    return [OwnFile(wanted[0].path, name)]


def _own_file(word: str) -> OwnFile | None:
    """The user's own file or folder that a word of the command line names; None when it names none."""
    from data_prep.own_files import ENDINGS, ending, stem
    from data_prep.sources import all_sources

    name, equals, rest = word.partition("=")
    named = bool(equals) and NAME.fullmatch(name) is not None and not Path(word).exists()
    path = Path(rest if named else word)
    if not named and word in all_sources():
        return None
    if named or "/" in word or path.exists() or ending(path)[0] in ENDINGS:
        return OwnFile(path, name if named else stem(path))
    return None


def _recipe_names(recipe: str) -> list[str]:
    from data_prep.sources import all_sources
    from molmo2_nemo.settings.compose import compose, stages_of

    names: dict[str, None] = {}
    for stage in stages_of([recipe]):
        names.update(dict.fromkeys(compose([recipe, f"stage={stage}"]).data.sources))
    own = [name for name in names if name not in all_sources()]
    if own:
        raise UserError(f"{recipe} trains on {', '.join(own)}, which is not a published data set: nothing to prepare")
    return list(names)


def _options(args: argparse.Namespace, name: str, out: Path, config: Any) -> Any:
    from data_prep.official_layout import source_folders
    from data_prep.parts import Part
    from data_prep.prepare import Options
    from data_prep.record_builder import BuildOptions

    folders = [Path(folder) for folder in args.source]
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    return Options(
        seed=args.seed,
        split=args.split,
        limit=args.limit,
        part=None if args.part is None else Part.parse(args.part),
        bytes_per_shard=args.shard_mb * 10**6,
        records_per_shard=args.shard_records,
        max_media_bytes=args.max_media_mb * 10**6,
        build=BuildOptions(args.cut_clips, args.video_height, args.video_fps, args.gop, args.max_image_side),
        workers=workers,
        folders=source_folders(folders, name),
        cache=Path(args.cache) if args.cache else out / ".cache",
        rate=args.rate,
        overwrite=args.overwrite,
        repeat_media=args.repeat_media,
        strict=args.strict,
        keep_going=args.keep_going,
        config=config,
    )


def _report(summary: Any, folder: Path) -> None:
    from data_prep.again import again_lines
    from data_prep.download import FAILED
    from data_prep.ledger import LEDGER, MISSING, MISSING_URLS
    from data_prep.media_kinds import NOT_FOUND
    from data_prep.noticed import note_lines
    from data_prep.own_coco import LEFT_OUT
    from data_prep.parts import CHUNK, FOLDER

    head = summary.head
    size = sum(shard["bytes"] for shard in head["shards"])
    state = "is there already" if summary.already else "done" if summary.look is None else "added to"
    length = f", counted as {head['length']:,} by the mixture" if head["length"] != head["records"] else ""
    records = plural(head["records"], "record")
    print(f"{folder}: {state}, {records}{length}, {plural(len(head['shards']), 'shard')}, {size / 1e6:,.1f} MB")
    if not head["records"] and not head["skipped"] and FOLDER.fullmatch(folder.name):
        print(f"  no sample fell to this part: they are dealt out {CHUNK} at a time; fewer parts have some each")
    print("".join(f"  {line}\n" for line in again_lines(summary, folder)), end="")
    _say_coverage(head)
    if shared := head.get("shared_media"):
        saved = f"{shared['members']:,} media are those of earlier records and not written again"
        print(f"  {saved}: {shared['bytes'] / 1e6:,.1f} MB less (--repeat-media writes them)")
    for line in note_lines(head.get("notes", {})):
        print(line)
    if not head["skipped"]:
        return
    total, firsts = sum(head["skipped"].values()), _firsts(folder / "skipped.jsonl")
    apart = head["skipped"].get(LEFT_OUT, 0)  # annotations, not records
    total -= apart
    skipped = f"{total:,} and {plural(apart, 'annotation')}" if apart else f"{total:,}"
    print(f"  skipped {skipped}, listed in {folder / 'skipped.jsonl'}:")
    for reason, count in sorted(head["skipped"].items(), key=lambda item: -item[1]):
        print(f"  {count:>10,}  {reason}{firsts.get(reason, '')}")
    if absent := head["skipped"].get(NOT_FOUND):
        listed = f", listed in {folder / MISSING}" if (folder / MISSING).is_file() else ""
        print(f"  {head['records']:,} of {head['records'] + total:,} records; media of {absent:,} not found{listed}")
    if failed := head["skipped"].get(FAILED):
        listed = f", listed in {folder / MISSING_URLS}" if (folder / MISSING_URLS).is_file() else ""
        print(f"  {failed:,} with downloads that failed{listed}")
    if (absent or failed) and (folder / LEDGER).is_file():
        print("  the same command adds what has come since")


def _say_coverage(head: dict[str, Any]) -> None:
    """How much of a published data set is there; in red where that is little."""
    from rich.console import Console
    from rich.text import Text

    from molmo2_nemo.data.coverage import OWN, coverage, standing_in

    if head.get("kind") == OWN:
        return
    name = str(head["name"])
    found = coverage(name, head)
    thin = standing_in(name, found)
    if thin:
        Console(highlight=False, soft_wrap=True).print(Text(f"  warning: {thin}", style="bold red"))
    elif found.words():
        print(f"  {found.words()}")


def _firsts(path: Path) -> dict[str, str]:
    """What to say of the first sample skipped for each reason, from the lines of skipped.jsonl."""
    from data_prep.sources.base import unit_of

    found: dict[str, str] = {}
    if not path.is_file():
        return found
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            if line["reason"] not in found:
                where = line["key"]
                if "file" in line:
                    where = f"{line['file']}, {line.get('unit') or unit_of(line['file'])} {line['line']}"
                found[line["reason"]] = f" (the first: {where}{': ' * bool(line['detail'])}{line['detail'][:200]})"
    return found
