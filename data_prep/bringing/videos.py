"""What `--fetch` says about a data set once its archives are there: coverage, and how missing videos are had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.bringing.catalogue import Catalogue, Item
from data_prep.bringing.coverage import coverage
from data_prep.bringing.fetch import hub_files
from data_prep.bringing.journal import WORK
from data_prep.bringing.needs import is_there
from data_prep.bringing.recipes import PROJECT, bucket_commands, bucket_objects, youtube_command
from data_prep.download import Downloader, DownloadError, Expected
from data_prep.official_layout import source_folders
from data_prep.sources.base import Manual, Source, SourceError
from molmo2_nemo.errors import DataError, plural
from molmo2_nemo.files import write_text


def report(source: Source, root: Path, catalogue: Catalogue, downloader: Downloader, project: str | None) -> list[str]:
    """Lines about one data set: how much of its media is there, what must be done by hand, commands for videos.

    Lists of what is missing are written to ROOT/.bringing/NAME.*.
    """
    items = catalogue.of([source.name])
    todo = [item for item in items if item.after or (item.how == "hand" and not is_there(item, root))]
    lines = [f"{source.name}: {_by_hand(item)}" for item in todo]
    folders = source_folders((root,), source.name)
    try:
        found = coverage(source, folders, root / WORK, downloader)
    except (SourceError, DownloadError) as error:
        why = "its files are not there yet" if isinstance(source.origin, Manual) and todo else error
        return [*lines, f"{source.name}: coverage is not known, as its rows cannot be read: {why}"]
    lines.insert(0, f"{source.name}: {found.words()}")
    if found.missing:
        path = root / WORK / f"{source.name}.missing.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{_name(media)}\n" for media in found.missing))
        lines.append(f"  what is missing: {path}")
    ids = found.youtube_ids()
    with_ids = [item for item in items if item.ids]
    if ids and with_ids:
        lines += _videos(source, with_ids[0], ids, root, downloader, project)
    return lines


def _by_hand(item: Item) -> str:
    form = f" ({item.form})" if item.form else ""
    what = f"by hand{form}: {item.what}, from {item.page}, to {item.target()}" if item.how == "hand" else item.what
    return f"{what}; then {item.after}" if item.after else what


def _name(media: object) -> str:
    paths = getattr(media, "paths", None)
    return " or ".join(paths) if paths else str(getattr(media, "folder", media))


def _videos(
    source: Source, item: Item, ids: Sequence[str], root: Path, downloader: Downloader, project: str | None
) -> list[str]:
    """How the missing YouTube videos are had: from the bucket those that it holds, the others from YouTube."""
    lists, lines, left = root / WORK / source.name, [], list(ids)
    target = root / item.into
    if item.how == "bucket":
        try:
            objects, left = bucket_objects(_mapping(item, downloader), ids, two_fps=item.two_fps)
        except (SourceError, DownloadError, DataError) as error:
            lines.append(f"  the bucket's list of videos cannot be had: {error}")
            objects = {}
        count = sum(map(len, objects.values()))
        if count:
            pays = "" if project else f" (put your Google Cloud project in place of {PROJECT}, or give --project)"
            lines.append(f"  {count:,} of {len(ids):,} videos are in a bucket; whoever copies them pays{pays}:")
            lines += [f"    {command}" for command in bucket_commands(objects, lists, target, project)]
    if left:
        lines.append(f"  {plural(len(left), 'video')} by their YouTube ids, where they still exist:")
        lines.append(f"    {youtube_command(left, lists, target)}")
    return lines


def _mapping(item: Item, downloader: Downloader) -> Path:
    """The file that says where the bucket's videos are, fetched once."""
    file = hub_files(item.repo, item.files)[0]
    return downloader.fetch(file.url, expected=Expected(file.size, file.sha256), headers=file.headers)
