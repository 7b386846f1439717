"""Columns of a user's own table -> the fields of a record: by their names, or as a map says.

A map, the file of `--map`, names for a field of ours the column that holds it, or nothing:

    image: photo                 # the column photo holds the paths of images
    question: frage
    options: [a, b, c, d]        # several columns, in this order
    answer: meta.answer          # a field inside an object
    subtitles:                   # not read, whatever the columns are called
    style: own:mood              # a text, of the annotation that a row makes
    box_format: xywh             # what the four numbers of a box are
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from data_prep.sources.own_boxes import FORMATS
from data_prep.sources.own_cells import CHATS, MEDIA, PLACED, as_record, cell_value, is_empty
from data_prep.sources.own_shapes import not_read
from molmo2_nemo.data.json_values import FieldError, show
from molmo2_nemo.errors import UserError, nearest

# Field -> names that columns have for it, the surest first. Compared in lower case, with _ for spaces and dashes.
NAMES: dict[str, tuple[str, ...]] = {
    "key": ("key", "id", "sample_id", "uid", "__key__"),
    "image": ("image", "img", "image_path", "img_path", "image_file", "image_url", "picture", "photo", "jpg", "png"),
    "images": ("images", "imgs", "image_paths"),
    "video": ("video", "video_path", "video_file", "video_url", "mp4"),
    "videos": ("videos",),
    "file": ("file_name", "filename", "file", "file_path", "filepath", "path", "media"),
    "caption": ("caption", "description"),
    "question": ("question", "query", "prompt", "instruction"),
    "context": ("input",),
    "answer": ("answer", "answers", "response", "output", "completion"),
    "options": ("options", "choices"),
    "answer_idx": ("answer_idx",),
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "text": ("text", "txt"),
    "annotations": ("annotations",),
    "variants": ("variants",),
    "variant_weights": ("variant_weights",),
    "label": ("label", "labels", "category", "categories", "class", "classes"),
    "points": ("points",),
    "boxes": ("boxes", "bboxes", "bbox", "box", "bounding_boxes", "bounding_box"),
    "point_scale": ("point_scale",),
    "width": ("width",),
    "height": ("height",),
    "subtitles": ("subtitles", "subtitle", "subtitle_file", "subtitle_path"),
    "clip": ("clip",),
    "start": ("start", "start_time", "clip_start"),
    "end": ("end", "end_time", "clip_end"),
    "sampling": ("sampling",),
    "weight": ("weight",),
    "weight_factor": ("weight_factor",),
}
LITERAL = ("style", "box_format")  # of which a map has the value, not the column
FIELDS = (*NAMES, *LITERAL)
TASKS = ("caption", "answer", "options", "text", *CHATS, "annotations", "variants", "points", "boxes")
ONLY_BESIDE: dict[
    str, str | tuple[str, ...]
] = {  # field -> the field, or fields, without which a column of its name means something else
    **{"context": "question", "answer": "question", "options": "question", "answer_idx": "options"},
    **{name: ("points", "boxes") for name in PLACED if name != "points"},
    **{"points": "label", "start": "end", "end": "start"},
}
OPTION_FORMS = ("{}", "option_{}", "choice_{}", "option{}")  # columns of one option each, {} a letter
Column = str | tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Which column is which field.

    Args:
        taken: field -> column, or columns.
        left: columns that nothing reads.
        mapped: fields that a map gave.
        classes: column of numbers -> the names that they stand for.
        style: of the annotation of each row; "" for the usual one.
        box_format: what the four numbers of a box are; "" where nothing says it.
    """

    taken: Mapping[str, Column]
    left: tuple[str, ...] = ()
    mapped: Collection[str] = ()
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    style: str = ""
    box_format: str = ""

    def read(self) -> list[str]:
        """The columns that are read."""
        return list(dict.fromkeys(one for column in self.taken.values() for one in _several(column)))

    @cached_property
    def _reads(self) -> set[str]:
        read = self.read()
        return {start for name in read for start in (name, *starts(name))}

    def names(self) -> dict[str, str]:
        """Path of a field in the entry that a row becomes -> its column, for messages."""
        made = {name: _several(column)[0] for name, column in self.taken.items()}
        if "annotations" not in made:
            made |= {f"annotations[0].{name}": column for name, column in made.items()}
            made |= {"annotations[0].text": made["caption"]} if "caption" in made else {}
            made |= {"annotations[0].points": made["boxes"]} if "boxes" in made else {}
        for name, others in {"file": ("image", "video"), "start": ("clip",)}.items():
            made |= {other: made[name] for other in others if name in made and other not in made}
        return made

    def literal(self) -> dict[str, str]:
        """What a map says that is no column."""
        return {name: said for name in LITERAL if (said := getattr(self, name))}

    def lines(self) -> list[str]:
        """What each column was taken for, in words."""
        rows = [(name, ", ".join(_several(column))) for name, column in self.taken.items()]
        width = max(len(column) for _, column in (*rows, *(("", column) for column in self.left), ("", "style")))
        made = [f"  {column:{width}}  {name}{' (--map)' if name in self.mapped else ''}" for name, column in rows]
        for name, said in self.literal().items():
            made.append(f"  {'':{width}}  {name} {said} (--map)")
        return made + [f"  {column:{width}}  not read" for column in self.left]

    def entry(self, row: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
        """The fields of one row, as a line of JSON Lines would have them; `notes` gets what is not read.

        Raises:
            FieldError: a cell that its field cannot have; it names the field, not the column.
        """
        found = {}
        for name, column in self.taken.items():
            cells = [self._cell(row, one) for one in _several(column)]
            if not isinstance(column, str):
                found[name] = _without_end(cells, name)
            elif not is_empty(cells[0]):
                found[name] = cell_value(name, cells[0])
        notes += [not_read(column) for column in row if column not in self._reads and not is_empty(row[column])]
        return as_record(found, self.style, self.box_format, notes)

    def _cell(self, row: Mapping[str, Any], column: str) -> Any:
        value, names = _get(row, column), self.classes.get(column)
        if names is None:
            return value
        several = value if isinstance(value, list) else [value]
        named = [names[one] if isinstance(one, int) and 0 <= one < len(names) else one for one in several]
        return named if isinstance(value, list) else named[0]


def _several(column: Column) -> Sequence[str]:
    return (column,) if isinstance(column, str) else column


def _get(row: Any, column: str) -> Any:
    """A cell; `a.b` is the field b of the object in the column a, unless there is a column a.b, and `a.0` the first
    entry of the list in a."""
    if isinstance(row, list):
        head, _, rest = column.partition(".")
        inner = row[int(head)] if head.isdecimal() and int(head) < len(row) else None
        return _get(inner, rest) if rest else inner
    if not isinstance(row, Mapping):
        return None
    if column in row:
        return row[column]
    head = next((start for start in starts(column) if start in row), "")
    return _get(row[head], column[len(head) + 1 :]) if head else None


def starts(column: str) -> Iterator[str]:
    """What stands before a dot in a name, the longest first: a.b and a of a.b.c."""
    while "." in column:
        column = column.rpartition(".")[0]
        yield column


def _without_end(cells: list[Any], name: str) -> list[Any]:
    """The cells of several columns without the empty ones after the last."""
    while cells and is_empty(cells[-1]):
        cells.pop()
    for i, cell in enumerate(cells):
        if is_empty(cell):
            raise FieldError.wrong(f"{name}[{i}]", "filled, as one after it is", cell)
    return cells


# --- which column is what --------------------------------------------------------------------------------------------


def find_columns(
    columns: Sequence[str],
    given: Mapping[str, Any] | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    inner: Collection[str] = (),
) -> Columns:
    """What each column of a table is.

    Args:
        given: the map of `--map`, as `read_map` returns it.
        classes: columns of numbers that stand for names.
        inner: columns that hold objects, which a map may name fields of.
    Raises:
        UserError: a map that names a column which is not there, or no column to learn from.
    """
    given = dict(given or {})
    style, box_format = (given.pop(name, None) or "" for name in LITERAL)
    mapped: dict[str, Column] = {
        name: column if isinstance(column, str) else tuple(column) for name, column in given.items() if column
    }
    used = set()
    for name, column in mapped.items():
        for one in _several(column):
            root = one if one in columns else next((start for start in starts(one) if start in inner), "")
            if one not in columns and root not in inner:
                raise UserError(f"--map: {name}: there is no column {one!r}; {nearest(one, columns)}")
            used.add(root)
    taken = mapped | {n: c for n, c in _by_names(columns, used).items() if n not in given}
    _settle(taken, set(given))
    if not set(TASKS) & set(taken):
        raise UserError(
            f"none of the columns ({', '.join(columns)}) is known as a caption, a question and an answer, messages or "
            f"text: name them in a file for --map, such as caption: {columns[-1] if columns else 'words'}"
        )
    in_order = {name: taken[name] for name in FIELDS if name in taken}
    reads = used | {one for column in in_order.values() for one in _several(column)}
    left = tuple(column for column in columns if column not in reads)
    return Columns(in_order, left, frozenset(mapped), classes or {}, style, box_format)


def _by_names(columns: Sequence[str], used: Collection[str]) -> dict[str, Column]:
    """Every field that a column has a name for, but columns that are used otherwise."""
    there: dict[str, str] = {}
    for column in columns:
        if column not in used:
            there.setdefault(re.sub(r"[\s-]+", "_", column.strip().lower()), column)
    found: dict[str, Column] = {}
    for name, names in NAMES.items():
        first = next((there[n] for n in names if n in there), None)
        if first is not None:
            found[name] = first
    if "options" not in found and (several := next(_option_columns(there), None)) is not None:
        found["options"] = several
    return found


def _option_columns(there: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for form in OPTION_FORMS:
        cells = tuple(there[n] for letter in "abcdefghij" if (n := form.format(letter)) in there)
        if len(cells) > 1:
            yield cells


def _settle(taken: dict[str, Column], given: Collection[str]) -> None:
    """Leave out what is a field only beside others, and what is said twice; a map's fields stay."""

    def drop(*names: str) -> None:
        for name in names:
            if name not in given:
                taken.pop(name, None)

    media = [name for name in MEDIA if name in taken]
    if [name for name in media if name != "file"]:
        drop("file")
    if "images" in taken:
        drop("image")
    if set(CHATS) & set(taken):
        drop("question", "answer", "text", "caption", "options")
    if "messages" in taken:
        drop("conversations")
    if "answer" not in taken and "answer_idx" not in taken:
        drop("question", "options")
    if "points" in taken or ("label" not in taken and set(TASKS) & set(taken) - {"boxes"}):
        drop("boxes")
    for name, other in (*ONLY_BESIDE.items(), *ONLY_BESIDE.items()):  # twice, as one may depend on another
        if not set([other] if isinstance(other, str) else other) & set(taken):
            drop(name)
    tasks = set(TASKS) & set(taken) - {"text"}
    if "text" in taken and "text" not in given and (tasks or media):
        column = taken.pop("text")
        if not tasks:
            taken["caption"] = column


def read_map(text: str, name: str) -> dict[str, Any]:
    """The map in a YAML or JSON file.

    Raises:
        UserError: no map from fields of ours to columns.
    """
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--map {name} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"--map {name} must hold lines such as image: photo (a field: its column), not {show(found)}")
    for target, column in found.items():
        if target == "box_format" and column not in FORMATS:
            raise UserError(f"--map {name}: box_format must be one of {', '.join(FORMATS)}, not {show(column)}")
        if target not in FIELDS:
            raise UserError(f"--map {name}: {target!r} is no field; {nearest(str(target), FIELDS)}")
        several = isinstance(column, list) and len(column) > 1 and all(isinstance(one, str) for one in column)
        if not (column is None or isinstance(column, str) or (several and target == "options")):
            expected = "the name of a column" + (", or a list of them" if target == "options" else "")
            raise UserError(f"--map {name}: {target} must be {expected}, not {show(column)}")
    return found
