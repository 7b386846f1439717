"""A Megatron-Energon data set on disk: what `.nv-meta` says of its tars, as data (no code of it is run)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2_nemo.data.json_values import show
from molmo2_nemo.errors import UserError, read_text

META = ".nv-meta"
SPLIT = "train"
# Sample type -> its attributes: fields of ours.
ATTRIBUTES: dict[str, dict[str, str]] = {
    "CaptioningSample": {"image": "image", "caption": "caption"},
    "VQASample": {"image": "image", "context": "question", "answers": "answer"},
    "VidQASample": {"video": "video", "context": "question", "answers": "answer"},
    "MultiChoiceVQASample": {
        **{"image": "image", "context": "question", "choices": "options"},
        "correct_choice_idx": "answer_idx",
    },
    "TextSample": {"text": "text"},
}
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True)
class EnergonSet:
    """What is read of a data set.

    Args:
        tars: those of the split `train`, less the excluded ones.
        unread: what is left out, in words.
        excluded: keys of records that are left out, by tar.
    """

    tars: tuple[Path, ...]
    unread: tuple[str, ...]
    excluded: Mapping[str, frozenset[str]]


def energon_set(root: Path) -> EnergonSet:
    """The tars of a data set.

    Raises:
        UserError: no split.yaml, or one that names no tars.
    """
    path = root / META / "split.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing: energon prepare writes it")
    found = _yaml(path)
    parts = found.get("split_parts")
    if not isinstance(parts, dict) or not parts.get(SPLIT):
        raise UserError(f"{path}: split_parts names no tars of {SPLIT}; it is {show(parts)}")
    names = [name for pattern in parts[SPLIT] for name in _expanded(str(pattern))]
    exclude = [name for pattern in found.get("exclude") or () for name in _expanded(str(pattern))]
    excluded: dict[str, set[str]] = {}
    for name in exclude:
        tar, _, key = name.partition(".tar/")
        if key:
            excluded.setdefault(f"{tar}.tar", set()).add(key)
    tars = [root / name for name in names if name not in exclude]
    if not tars:
        raise UserError(f"{path}: all tars of {SPLIT} are excluded")
    for file in tars:
        if root not in file.resolve().parents or not file.is_file():
            raise UserError(f"{path} names {file}, which is {f'not below {root}' if file.exists() else 'missing'}")
    unread = [f"the split {name}: {len(listed)} patterns of tars" for name, listed in parts.items() if name != SPLIT]
    unread += [f"{len(exclude)} tars or records that split.yaml excludes"] if exclude else []
    frozen = {name: frozenset(keys) for name, keys in excluded.items()}
    return EnergonSet(tuple(tars), tuple(unread), frozen)


def field_map(root: Path) -> dict[str, str] | None:
    """The fields of ours and where dataset.yaml says that they are; None of crude samples, of which it says nothing.

    Raises:
        UserError: samples of another type, or made by code.
    """
    path = root / META / "dataset.yaml"
    if not path.is_file():
        return None
    found = _yaml(path)
    kind = found.get("sample_type", {})
    name = str(kind.get("__class__", "")) if isinstance(kind, dict) else ""
    name = name or str(found.get("__class__", "")).replace("Webdataset", "Sample")
    if name == "CrudeSample":
        return None
    fields, known = found.get("field_map"), ATTRIBUTES.get(name)
    hint = "name the fields in a file for --map, such as caption: txt or question: json[question]"
    if known is None:
        raise UserError(f"{path}: samples are of the type {name or 'None'}, not {', '.join(ATTRIBUTES)}; {hint}")
    if not isinstance(fields, dict):
        loader = found.get("sample_loader", "code")
        raise UserError(f"{path}: samples are made by {loader}, and code of a data set is not run; {hint}")
    return {known[name]: str(place) for name, place in fields.items() if name in known and place}


def _expanded(pattern: str) -> list[str]:
    """The names of a pattern with {000..003} or {a,b} in it."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    if match[3] is not None:
        several = match[3].split(",")
    else:
        several = [f"{number:0{len(match[1])}d}" for number in range(int(match[1]), int(match[2]) + 1)]
    return [name for one in several for name in _expanded(pattern[: match.start()] + one + pattern[match.end() :])]


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold an object, not {show(found)}")
    return found
