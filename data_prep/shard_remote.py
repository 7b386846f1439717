"""`molmo2 shards check` and `stats` of data sets at an object store."""

from __future__ import annotations

import tempfile
from pathlib import Path

from data_prep.noticed import Notes
from data_prep.shard_copy import PLACE, StoreSide
from data_prep.shard_tools import Problem, Terms, check, check_shard, media_tars
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.manifest import MANIFEST, read_entries, read_head
from molmo2_nemo.data.objects.files import RemoteFiles


def manifest_file(place: PLACE, config: DataConfig) -> Path:
    """A file of this machine with the manifest of a data set. Raises ShardError."""
    if isinstance(place, Path):
        return place / MANIFEST
    files = RemoteFiles(place, config.store)
    files.head(None)
    return files.manifest()


def check_at(
    place: PLACE, *, quick: bool = False, workers: int = 0, config: DataConfig, notes: Notes | None = None
) -> list[Problem]:
    """`check` of a folder, or of a data set at an object store: each shard is fetched, checked and removed again."""
    if isinstance(place, Path):
        return check(place, quick=quick, workers=workers, config=config, notes=notes)
    side = StoreSide(place, config.store)
    manifest = manifest_file(place, config)
    head, listed, problems = read_head(manifest), side.listing(), []
    with tempfile.TemporaryDirectory(dir=side.cache.folder, prefix="checking-") as scratch:
        folder = Path(scratch)
        for shard, entries in zip(head["shards"], read_entries(manifest), strict=False):
            tars = media_tars(folder, head, entries)
            _have(side, folder, {shard["name"], *(path.name for path in tars.values())})
            problems += check_shard(folder, shard, entries, quick, Terms.of(head, config), tars, notes)
    known = {shard["name"] for shard in head["shards"]} | set(head.get("unused", ()))
    others = [name for name in sorted(listed) if name.endswith(".tar") and name not in known]
    return problems + [Problem(name, "", "is not listed in the manifest") for name in others]


def _have(side: StoreSide, folder: Path, wanted: set[str]) -> None:
    """Exactly the wanted shards in a folder, as far as the store has them, as they are there."""
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name in sorted(wanted):
        if not (folder / name).exists() and (found := side.store.look(name)) is not None:
            with (folder / name).open("wb") as file:
                for data in side.store.chunks(name, found.size):
                    file.write(data)
