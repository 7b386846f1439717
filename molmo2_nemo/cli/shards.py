"""Maintain shards: check, describe and copy them, repair damaged ones, index foreign ones, join parts.

DIR is a data set, or a folder of data sets; for check, stats and copy it may be an address, such as s3://bucket/set."""

from __future__ import annotations

import argparse
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

from molmo2_nemo.cli.options import add_run_arguments, check_file, check_numbers, run_settings
from molmo2_nemo.data.objects.address import is_url
from molmo2_nemo.errors import USER_ERROR, UserError, plural, writing

EXAMPLES = """\
examples:
  molmo2 shards check /data/shards                 # every file, checksum, record, image and video
  molmo2 shards check /data/shards --quick         # sizes and checksums
  molmo2 shards check /data/shards --for recipe=8b stage=long    # as that run will read them
  molmo2 shards stats /data/shards --png stats.png # counts, tokens, crops, licences
  molmo2 shards repair /data/shards/pixmo_cap      # without the records that cannot be used
  molmo2 shards join /data/shards/own              # of own.part-01-of-16 and its siblings (molmo2 prepare --part)
  molmo2 shards index /data/foreign                # webdataset tars that somebody else wrote, with this project's JSON
  molmo2 shards copy /data/shards s3://bucket/shards     # or back; again: goes on where it was stopped
  molmo2 shards index /data/laion --caption-from txt   # image-text tars (img2dataset): KEY.jpg, KEY.txt, KEY.json
"""

SHOWN = 20  # problems of one data set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check", "stats", "repair", "index", "join", "copy"), help="what to do")
    parser.add_argument("folder", metavar="DIR", help="a data set, or a folder of data sets")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="copy: folder or address of the copies")
    parser.add_argument("--overwrite", action="store_true", help="copy: replace another data set at TARGET")
    parser.add_argument("--cache", metavar="DIR", help="files brought from a store (default: data.store.cache's)")
    parser.add_argument("--quick", action="store_true", help="check: sizes and checksums only")
    parser.add_argument("--workers", type=int, metavar="N", help="check: processes (default: all cores; 0: this one)")
    parser.add_argument("--json", action="store_true", help="check: a JSON object a line for each problem")
    parser.add_argument("--png", metavar="FILE", help="stats: draw histograms, into this file")
    parser.add_argument("--name", help="index: name of the data set (default: the folder's)")
    foreign = parser.add_argument_group(
        "index, for tars with another tool's JSON",
        "PLACE is a member's suffix, as txt, or a field, as json:caption",
    )
    for text in ("caption", "question", "answer"):
        foreign.add_argument(f"--{text}-from", metavar="PLACE", help=f"where each record's {text} is")
    foreign.add_argument("--caption-style", metavar="STYLE", help="style of the captions (default: long_caption)")
    foreign.add_argument(
        "--media-from",
        metavar="SUFFIX",
        nargs="+",
        help="members with the images, in order, or the video (default: all)",
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check_numbers(args, {"workers": 0})
    if args.action != "index" and any((args.caption_from, args.question_from, args.answer_from, args.media_from)):
        raise UserError(f"--caption-from and its like belong to molmo2 shards index, not to {args.action}")
    if args.action == "stats" and (args.for_run or args.truncated):
        raise UserError("--for and --truncated belong to check, repair and index, not to stats")
    if args.json and args.action != "check":
        raise UserError(f"--json belongs to molmo2 shards check, not to {args.action}")
    if args.target and args.action != "copy":
        holder = ", or the folder that holds both" if args.action in ("check", "stats") else ""
        raise UserError(f"shards {args.action} takes one folder, not also {args.target}: call it for each{holder}")
    if args.overwrite and args.action != "copy":
        raise UserError(f"--overwrite belongs to molmo2 shards copy, not to {args.action}")
    if args.action in ("repair", "index", "join") and is_url(args.folder):
        raise UserError(
            f"shards {args.action} changes files of a folder: copy the data set first, then back: "
            f"molmo2 shards copy {args.folder} DIR; molmo2 shards {args.action} DIR; "
            f"molmo2 shards copy DIR {args.folder} --overwrite"
        )
    actions = {"check": _check, "stats": _stats, "repair": _repair, "index": _index, "join": _join, "copy": _copy}
    return actions[args.action](args)


def _store(args: argparse.Namespace, config: Any = None) -> Any:
    """The settings under which stores are read, with --cache in them."""
    from molmo2_nemo.data.config import StoreConfig
    from molmo2_nemo.data.objects.files import use

    store = StoreConfig() if config is None else config.store
    store.cache = args.cache or store.cache
    use(store)
    return store


def _copy(args: argparse.Namespace) -> int:
    from rich.console import Console

    from data_prep.progress import CopyProgress
    from data_prep.shard_copy import check_apart, copy, sets_at, target_of
    from molmo2_nemo.data.objects.address import place_of

    if not args.target:
        raise UserError("copy needs two places: molmo2 shards copy FROM TO; one of them may be s3://bucket/folder")
    store, source, target = _store(args), place_of(args.folder), place_of(args.target)
    check_apart(source, target)
    targets = target_of(source, target, sets_at(source, store))
    for at, to in targets.items():
        with CopyProgress(Console(stderr=True, highlight=False)) as progress:
            found = copy(at, to, store, overwrite=args.overwrite, watch=progress.watch)
        there = f", {found.already} were there already" if found.already else ""
        there += f", {found.removed} of the data set that was replaced removed" if found.removed else ""
        copied = f"{plural(found.files, 'shard')} copied, {found.bytes / 1e6:,.1f} MB{there}"
        print(f"{to}: {copied}; checksums are the manifest's")
    return 0


def _check(args: argparse.Namespace) -> int:
    from data_prep.noticed import Notes, note_lines
    from data_prep.run_limits import in_words
    from data_prep.shard_copy import sets_at
    from data_prep.shard_remote import check_at, manifest_file
    from molmo2_nemo.data.manifest import read_head, without_crc
    from molmo2_nemo.data.objects.address import place_of

    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    damaged, config = 0, run_settings(args)
    _store(args, config)
    for folder in sets_at(place_of(args.folder), config.store):
        notes = Notes()
        problems = check_at(folder, quick=args.quick, workers=workers, config=config, notes=notes)
        damaged += bool(problems)
        if args.json:
            for problem in problems:
                print(json.dumps({"folder": str(folder), **problem.line("problem")}))
            for text, (count, first) in notes.json().items():
                note = {"key": first, "reason": "note", "detail": text, "records": count}
                print(json.dumps({"folder": str(folder), **note}))
            continue
        manifest = manifest_file(folder, config)
        head = read_head(manifest)
        state = f"{plural(len(problems), 'problem')}" if problems else "good"
        records = plural(sum(shard["records"] for shard in head["shards"]), "record")
        print(f"{folder}: {records}, {plural(len(head['shards']), 'shard')}, {state}")
        _show(problems)
        for line in note_lines(notes.json()):
            print(line)
        if lacking := without_crc(manifest):
            unsure = plural(lacking, "record has", "records have")
            print(f"  {unsure} no checksum: of those, only damage that shows when decoding is found")
    if args.json:
        return USER_ERROR if damaged else 0
    if not args.quick:
        print(in_words(config))
    if damaged:
        print(
            "molmo2 shards repair DIR renames intact shards back, rewrites damaged ones without the records that "
            "cannot be used, and keeps the originals of those"
        )
    return USER_ERROR if damaged else 0


def _show(problems: list) -> None:
    for problem in problems[:SHOWN]:
        print(f"  {problem.shard}{':' + problem.key if problem.key else ''}: {problem.text}")
    if len(problems) > SHOWN:
        print(f"  and {len(problems) - SHOWN} more")


def _repair(args: argparse.Namespace) -> int:
    from data_prep.run_limits import in_words
    from data_prep.shard_repair import repair
    from data_prep.shard_tools import data_sets

    config = run_settings(args)
    for folder in data_sets(Path(args.folder)):
        said: list[str] = []
        lost = repair(folder, config, said)
        removed = f"{plural(len(lost), 'record')} removed" if lost else "no record removed"
        print(f"{folder}: {removed if lost or said else 'nothing to repair'}")
        _show(lost)
        for line in said:
            print(f"  {line}")
    print(in_words(config))
    return 0


def _stats(args: argparse.Namespace) -> int:
    from rich.console import Console

    from data_prep.shard_copy import sets_at
    from data_prep.shard_remote import manifest_file
    from data_prep.shard_stats import collect, draw, tables
    from molmo2_nemo.data.config import DataConfig
    from molmo2_nemo.data.objects.address import place_of

    config, place = DataConfig(), place_of(args.folder)
    _store(args, config)
    folders = sets_at(place, config.store)
    path = Path(args.png) if args.png else None
    if path is not None:
        check_file("--png", path)
    found = [collect(Path(folder.name), manifest_file(folder, config)) for folder in folders]
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=80)
    for part in tables(found):
        console.print(part)
    if path is not None:
        with writing(path):
            draw(found, path)
        print(f"histograms: {path}")
    return 0


def _index(args: argparse.Namespace) -> int:
    from data_prep.noticed import note_lines
    from data_prep.run_limits import in_words
    from data_prep.shard_tools import index
    from molmo2_nemo.data.foreign import ForeignTexts

    places = (args.caption_from, args.question_from, args.answer_from, args.caption_style)
    media = tuple(args.media_from or ())
    texts = ForeignTexts(*places, media) if any(places) or media else None
    folder, config = Path(args.folder), run_settings(args)
    head = index(folder, args.name, texts, config)
    print(f"{folder}: {plural(head['records'], 'record')} in {plural(len(head['shards']), 'shard')}")
    if passed := head.get("passed_over"):
        print(f"  passed over, as webdataset does: {', '.join(f'{n:,} {kind}' for kind, n in passed.items())}")
    for line in note_lines(head.get("notes", {})):
        print(line)
    for reason, count in head.get("skipped", {}).items():
        print(f"  {count:,} {reason}, as training could not use them: {folder / 'skipped.jsonl'} says why for each")
        _show_lines(folder / "skipped.jsonl")
    print(in_words(config))
    return 0


def _join(args: argparse.Namespace) -> int:
    from data_prep.noticed import note_lines
    from data_prep.parts import join, joinable

    for out in joinable(Path(args.folder)):
        head, folders = join(out)
        shards = f"{plural(head['records'], 'record')} in {plural(len(head['shards']), 'shard')}"
        print(f"{out}: {shards}, of {plural(len(folders), 'part')}")
        for line in note_lines(head.get("notes", {})):
            print(line)
        if head["skipped"]:
            print(f"  skipped {sum(head['skipped'].values()):,}, listed in {out / 'skipped.jsonl'}")
        print(f"  the parts are no longer needed: rm -r {out}.part-*")
    return 0


def _show_lines(path: Path) -> None:
    with path.open(encoding="utf-8") as file:
        for line in islice(file, SHOWN):
            entry = json.loads(line)
            print(f"  {entry['shard']}:{entry['key']}: {entry['detail']}")
