"""Data sets on the Hugging Face Hub: the files of a split, and fetching them. No code of a data set is ever run.

`datasets` resolves configurations and splits (of a repository, or of a local folder laid out like one) to files;
`huggingface_hub` fetches each into its cache, where an interrupted transfer resumes.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.base import Hub, SourceError

HUB_PREFIX = "hf://datasets/"
_unreachable: list[str] = []  # why the Hub could not be reached; remembered in this process
DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow")


def split_files(origin: Hub, config: str | None, folder: Path | None) -> list[str]:
    """The files of one split: local paths, or hf:// addresses.

    Args:
        folder: a copy of the repository, or a folder of its parquet / JSON files; None = ask the Hub.
    Raises:
        SourceError: no such repository, configuration or split, or no network.
    """
    if folder is not None and not (folder / "README.md").is_file():
        return _by_name(folder, config, origin.split)
    place = str(folder) if folder is not None else origin.repo
    if folder is None and _unreachable:
        raise SourceError(f"data set {place}: the Hub cannot be reached ({_unreachable[0]})")
    try:
        data_files = _builder(place, config, None if folder is not None else origin.revision).config.data_files or {}
    except Exception as error:  # the libraries raise many types with helpful messages
        hint = ""
        if folder is None and isinstance(error, ConnectionError):
            _unreachable.append(_short(error))  # dozens of data sets need not each run into the same timeout
            hint = "Check the network, or put a copy of the repository below --source"
        label = f"data set {place}, configuration {config or 'default'}"
        raise SourceError(f"{label}: {_short(error)} {hint}".strip()) from None
    files = data_files.get(origin.split)
    if not files:
        there = ", ".join(data_files) or "none"
        raise SourceError(f"data set {place} has no split {origin.split!r} (there are: {there})")
    return [str(file) for file in files]


def _by_name(folder: Path, config: str | None, split: str) -> list[str]:
    """Data files of a folder without a data card: those in FOLDER/<configuration> named after the split, or all."""
    place = folder / config if config else folder
    files = sorted(path for path in _data_files(place))
    named = [path for path in files if re.split(r"[-_.]", path.name)[0] == split or path.parent.name == split]
    others = {"train", "test", "validation", "val", "dev"} - {split}
    if not named:  # no file is named after any split
        named = [path for path in files if not others & {path.parent.name, *re.split(r"[-_.]", path.name)}]
    if not named:
        there = ", ".join(str(path.relative_to(place)) for path in files[:6]) or "nothing"
        raise SourceError(f"{place} has no .parquet, .jsonl, .json, .csv or .tsv file for split {split!r} ({there})")
    return [str(path) for path in named]


def _builder(place: str, config: str | None, revision: str | None) -> Any:
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # it would report every retry; this package reports the last error
    options: dict[str, Any] = {"revision": revision} if revision else {}
    if int(datasets.__version__.split(".")[0]) < 4:  # later versions cannot run code of a data set
        options["trust_remote_code"] = False
    datasets.disable_progress_bars()
    return datasets.load_dataset_builder(place, config, **options)


def open_file(file: str) -> Path:
    """The local path of one of `split_files`, fetched if it is on the Hub."""
    if not file.startswith(HUB_PREFIX):
        return Path(file)
    repo, revision, path = parts(file)
    return download_file(repo, path, revision)


def parts(file: str) -> tuple[str, str, str]:
    """The (repository, revision, path) of an hf:// address."""
    repo, _, rest = file.removeprefix(HUB_PREFIX).partition("@")
    revision, _, path = rest.partition("/")
    return repo, revision.replace("%2F", "/"), path


def download_file(repo: str, path: str, revision: str | None) -> Path:
    """One file of a data set repository, from the cache or the Hub.

    Raises:
        SourceError: no such file, no permission, or no network.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo, path, repo_type="dataset", revision=revision))
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise
        raise SourceError(f"{repo}/{path} cannot be fetched from the Hub: {_short(error)}") from None
    except Exception as error:
        raise SourceError(f"{repo}/{path} cannot be fetched from the Hub: {_short(error)}") from None


def matching_files(repo: str, pattern: str) -> list[str]:
    """Files of a data set repository whose path matches a pattern such as `data/*.arrow`, sorted by name.

    Raises:
        SourceError: no such repository or file, no permission, or no network.
    """
    import huggingface_hub

    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset")
    except Exception as error:  # as in download_file
        raise SourceError(f"the files of {repo} cannot be listed: {_short(error)}") from None
    found = sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))
    if not found:
        raise SourceError(f"{repo} has no file {pattern} (there are: {', '.join(sorted(names)[:6]) or 'none'})")
    return found


def local_copy(origin: Hub, folders: tuple[Path, ...], *, own: bool = True) -> Path | None:
    """The folder below --source that holds this repository's files; None if there is none.

    It is FOLDER/<repo name>, or one of the repository's other names (`copies`); or, for the rows of the source itself
    (`own`), FOLDER if data files lie at its top level, in data/, or in a folder named after a configuration or the
    split. JSON files among the media do not make it a copy.
    """
    for folder in folders:
        for name in (origin.repo.rpartition("/")[2], *origin.copies):
            if (folder / name).is_dir() and any(_data_files(folder / name)):
                return folder / name
        if own and _has_rows(folder, origin):
            return folder
    return None


def _has_rows(folder: Path, origin: Hub) -> bool:
    if (folder / "README.md").is_file():  # a clone of the repository: its card says where the files are
        return any(_data_files(folder))
    if any((folder / config).is_dir() and any(_data_files(folder / config)) for config in origin.configs):
        return True
    if origin.configs:
        return False
    places = (folder, folder / "data", folder / "default", folder / origin.split)
    return any(path.suffix in DATA_SUFFIXES for place in places if place.is_dir() for path in place.iterdir())


def _data_files(folder: Path) -> Iterator[Path]:
    for root, _, files in os.walk(folder):
        for name in files:
            if name.endswith(DATA_SUFFIXES):
                yield Path(root) / name


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
