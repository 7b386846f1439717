"""Lists of wordings by name, this project's own or those of a file that `molmo2 templates import` wrote.

Each wording holds the fields of its list in braces. A file is JSON with a fingerprint of everything that is drawn from
it: an edited one is refused, and a run's settings keep the fingerprint of what it was trained with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from molmo2_nemo.data.config import TextFormatConfig
from molmo2_nemo.data.templates import OWN
from molmo2_nemo.errors import DataError, UserError, read_text
from molmo2_nemo.files import write_text

KIND, VERSION = "molmo2 wordings", 1
FIELD = re.compile(r"{(\w+)}")
SHOWN = 60  # characters of a wording in a message


@dataclass(frozen=True)
class Fields:
    """Which fields a wording has in braces."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


LABELS = (  # styles whose records hold a question that was drawn from the list of that name
    *("activitynet_label", "coin_label", "epic_kitchens_label", "moments_in_time_label", "kinetics_label"),
    *("youcook2_label", "charades_sta"),
)
LABEL, SPAN, TIME, QUESTION = Fields(("label",)), Fields(("start", "end")), Fields(("time",)), Fields(("question",))
IMAGES = Fields(("label",), ("images",))  # a wording may speak of all images, without naming them
LISTS: dict[str, Fields] = {
    **dict.fromkeys(("long_caption", "short_caption", "video_long_caption", "video_short_caption"), Fields()),
    **dict.fromkeys(("video_transcript", "video_motion_caption", "no_pointing"), Fields()),
    **dict.fromkeys((*LABELS, "paxion"), Fields()),
    "video_object_caption": Fields(("object",)),
    **dict.fromkeys(("video_clip_caption_start_end", "video_clip_caption_start_end_in_seconds"), SPAN),
    **dict.fromkeys(("video_clip_transcript_start_end", "video_clip_transcript_start_end_in_seconds"), SPAN),
    **dict.fromkeys(("video_frame_caption_timestamp", "video_frame_caption_timestamp_in_seconds"), TIME),
    **dict.fromkeys(("video_short_answer", "explanation"), QUESTION),
    **dict.fromkeys(("pointing", "point_count", "count_then_point", "only_count"), LABEL),
    **dict.fromkeys(("video_point", "video_point_count", "video_count_point", "video_count"), LABEL),
    **dict.fromkeys(("multi_image_pointing", "multi_image_point_then_count"), IMAGES),
    **dict.fromkeys(("multi_image_count_then_point", "multi_image_counting"), IMAGES),
    **dict.fromkeys(("video_point_track_per_frame_default_fps", "video_point_ground_start_end"), LABEL),
    "video_point_track_per_frame": Fields(("label", "fps")),
    "video_single_point_track_per_frame": Fields(("point", "fps")),
    "video_single_point_track_start_end": Fields(("point",)),
}
NOT_PUBLISHED = ("video_single_point_track_start_end",)  # the released code names the style and has no wording for it
PARTS = ("question", "options")


@dataclass(frozen=True)
class ChoiceWords:
    """The published wording of multiple choice: marks, names, separators, instructions and layouts."""

    common_markers: tuple[str, ...] = field(metadata={"fields": Fields(("name",))})  # before an option
    other_markers: tuple[str, ...] = field(metadata={"fields": Fields(("name",))})
    bullets: tuple[str, ...] = field(metadata={"fields": Fields()})  # before options that have no name
    separators: tuple[str, ...] = field(metadata={"fields": Fields()})  # after options on one line
    names: tuple[tuple[str, ...], ...]  # kinds of names of options: letters, numbers, ...
    name_words: tuple[str, ...] = field(metadata={"fields": Fields()})  # the word for a name of each kind
    name_instructions: tuple[str, ...] = field(metadata={"fields": Fields(("name",))})  # the answer is a name
    instructions: tuple[str, ...] = field(metadata={"fields": Fields()})
    named_instructions: tuple[str, ...] = field(metadata={"fields": Fields(("name",))})  # only if options have names
    layouts: tuple[str, ...] = field(metadata={"fields": Fields((*PARTS, "instruction"))})
    name_layouts: tuple[str, ...] = field(metadata={"fields": Fields(PARTS, ("name",))})  # the instruction is in them
    plain_layouts: tuple[str, ...] = field(metadata={"fields": Fields(PARTS)})


@dataclass(frozen=True)
class Wordings:
    """What is drawn from to word a prompt."""

    lists: Mapping[str, tuple[str, ...]]  # one for each name of LISTS
    choice: ChoiceWords | None = None  # None: the layouts of multiple_choice.py
    source: Mapping[str, Any] = field(default_factory=dict)  # where they are from

    def fingerprint(self) -> str:
        """SHA-256 of everything that is drawn from."""
        return _fingerprint({name: list(texts) for name, texts in self.lists.items()}, self.choice)


OWN_WORDINGS = Wordings(OWN)


def _fingerprint(lists: Mapping[str, Any], choice: ChoiceWords | None) -> str:
    drawn = {"lists": lists, "choice": asdict(choice) if choice else None}
    return hashlib.sha256(json.dumps(drawn, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def check_list(texts: Any, allowed: Fields, where: str) -> tuple[str, ...]:
    """A list of wordings, each with the fields that it has to have and no others.

    Raises:
        DataError: names the list, the number of the wording and the field.
    """
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: expected a list of texts")
    if not texts:
        raise DataError(f"{where}: the list is empty; a prompt needs at least one wording")
    for number, text in enumerate(texts, start=1):
        found = FIELD.findall(text)
        place = f"{where}, wording {number} ({text[:SHOWN]!r})"
        if not text.strip():
            raise DataError(f"{place}: is empty")
        for name in allowed.required:
            if name not in found:
                raise DataError(f"{place}: {{{name}}} is missing")
        for name in found:
            if name not in (*allowed.required, *allowed.optional):
                known = ", ".join(f"{{{n}}}" for n in (*allowed.required, *allowed.optional)) or "none"
                raise DataError(f"{place}: unknown field {{{name}}}; known here: {known}")
    return tuple(texts)


def checked(lists: Mapping[str, Any], choice: Mapping[str, Any], source: Mapping[str, Any], where: str) -> Wordings:
    """Published wordings, complete and with the right fields.

    Raises:
        DataError: a list is missing, unknown or wrong; names it after `where`.
    """
    _same_names(lists, LISTS, f"{where}: lists")
    texts = {name: check_list(lists[name], allowed, f"{where}: {name}") for name, allowed in LISTS.items()}
    _same_names(choice, [f.name for f in fields(ChoiceWords)], f"{where}: choice")
    parts: dict[str, Any] = {}
    for part in fields(ChoiceWords):
        place = f"{where}: choice.{part.name}"
        if part.name == "names":
            kinds = choice[part.name]
            if not isinstance(kinds, (list, tuple)) or not kinds:
                raise DataError(f"{place}: expected a list of lists of names")
            parts[part.name] = tuple(check_list(kind, Fields(), f"{place}[{i}]") for i, kind in enumerate(kinds))
        else:
            parts[part.name] = check_list(choice[part.name], part.metadata["fields"], place)
    if len(parts["name_words"]) != len(parts["names"]):
        raise DataError(f"{where}: choice.name_words: one word for each of the {len(parts['names'])} kinds of names")
    return Wordings(texts, ChoiceWords(**parts), source)


def _same_names(found: Any, expected: Any, where: str) -> None:
    if not isinstance(found, Mapping):
        raise DataError(f"{where}: expected an object")
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        what = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        raise DataError(f"{where}: {'; '.join(what)}")


def save(wordings: Wordings, path: Path) -> None:
    """Write a file that `load` reads, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    assert wordings.choice is not None
    values = {
        "kind": KIND,
        "version": VERSION,
        "source": dict(wordings.source),
        "sha256": wordings.fingerprint(),
        "lists": {name: list(texts) for name, texts in wordings.lists.items()},
        "choice": asdict(wordings.choice),
    }
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def load(path: str | Path) -> Wordings:
    """The wordings in a file that `molmo2 templates import` wrote.

    Raises:
        UserError: no such file, not such a file, or one that was edited; says what to do.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such file; molmo2 templates import makes one, and a run's folder has a copy")
    state = file.stat()
    return _load(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _load(file: Path, changed: int, size: int) -> Wordings:
    try:
        values = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else DataError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise DataError(f"{file} is not a file of wordings; make one with molmo2 templates import")
    if values.get("version") != VERSION:
        raise DataError(f"{file} has version {values.get('version')!r} of wordings, this program reads {VERSION}")
    source = values.get("source")
    made = checked(
        values.get("lists") or {}, values.get("choice") or {}, source if isinstance(source, dict) else {}, str(file)
    )
    if values.get("sha256") != made.fingerprint():
        raise DataError(
            f"{file} was edited: its wordings have the fingerprint {made.fingerprint()[:12]}, it says "
            f"{str(values.get('sha256'))[:12]}; import it again, or use the copy in the folder of a run"
        )
    return made


def pin(config: TextFormatConfig) -> None:
    """Note the fingerprint of the file of wordings in the settings, unless they have one or the file cannot be used
    (which `wordings_of` says)."""
    if config.templates is not None and config.templates_sha256 is None:
        with suppress(UserError, OSError):
            config.templates_sha256 = load(config.templates).fingerprint()


def wordings_of(config: TextFormatConfig) -> Wordings:
    """The wordings that a run's settings name.

    Raises:
        UserError: the file cannot be used, or holds others than the run was trained with.
    """
    if config.templates is None:
        return OWN_WORDINGS
    made = load(config.templates)
    if config.templates_sha256 not in (None, made.fingerprint()):
        raise UserError(
            f"data.text.templates={config.templates}: these wordings have the fingerprint "
            f"{made.fingerprint()[:12]}, the settings are for {str(config.templates_sha256)[:12]}; name the file that "
            "the run was trained with, of which its folder has a copy, or leave data.text.templates_sha256 out"
        )
    return made
