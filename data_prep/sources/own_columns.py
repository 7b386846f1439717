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
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from data_prep.sources.own_boxes import FORMATS
from data_prep.sources.own_cells import CHATS, MEDIA, NOTHING, PLACED, as_record, cell_value, is_empty, taken_as_word
from data_prep.sources.own_shapes import not_read
from molmo2_nemo.data.json_values import Fault, FieldError, show
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
RATHER = {"image": "images", "boxes": "points"}  # field -> what is read where both are there
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
        others: field -> further columns with a name of it, of which the first is taken where a row lacks its own.
    """

    taken: Mapping[str, Column]
    left: tuple[str, ...] = ()
    mapped: Collection[str] = ()
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    style: str = ""
    box_format: str = ""
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def read(self) -> list[str]:
        """The columns that are read."""
        return list(dict.fromkeys([*self._taken(), *(one for several in self.others.values() for one in several)]))

    def _taken(self) -> list[str]:
        return [one for column in self.taken.values() for one in _several(column)]

    @cached_property
    def _reads(self) -> set[str]:
        return {start for name in self._taken() for start in (name, *starts(name))}

    def of_row(self, row: Mapping[str, Any], notes: list[str]) -> Columns:
        """The columns of one row: others stand in for those that it lacks, which `notes` says."""
        there: dict[str, Column] = {}
        for name, others in self.others.items():
            column = self.taken[name]
            if isinstance(column, str) and is_empty(self._cell(row, column)):
                other = next((one for one in others if not is_empty(self._cell(row, one))), None)
                there |= {} if other is None else {name: other}
        unread = [drop for one, rather in RATHER.items() if (drop := self._drop(row, one, rather))]
        notes += [f"a row without {self.taken[name]!r}: {name} from {other!r}" for name, other in there.items()]
        if not there and not unread:
            return self
        return replace(self, taken={name: c for name, c in {**self.taken, **there}.items() if name not in unread})

    def _drop(self, row: Mapping[str, Any], name: str, rather: str) -> str:
        """Which of two fields that exclude each other a row is read without; "" where a map has the last word."""
        if name not in self.taken or rather not in self.taken or name in self.mapped:
            return ""
        columns = (*_several(self.taken[rather]), *self.others.get(rather, ()))
        return rather if all(is_empty(self._cell(row, one)) for one in columns) else name

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
        others = [(name, column) for name, several in self.others.items() for column in several]
        wide = (*rows, *others, *(("", column) for column in self.left), ("", "style"))
        width = max(len(column) for _, column in wide)
        made = [f"  {column:{width}}  {name}{' (--map)' if name in self.mapped else ''}" for name, column in rows]
        made += [f"  {column:{width}}  {name}, in rows without {self.taken[name]}" for name, column in others]
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
                if found[name] == cells[0] and str(cells[0]).strip().lower() in NOTHING:
                    notes.append(taken_as_word(column, cells[0]))
        notes += [not_read(column) for column in row if column not in self._reads and not is_empty(row[column])]
        self._check_boxes(row, found)
        if not {*TASKS, "question"} & set(found):
            raise self._nothing(row)
        return as_record(found, self.style, self.box_format, notes)

    def _check_boxes(self, row: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Refuse a row that has other boxes in another column."""
        for other in self.others.get("boxes", ()) if "boxes" in found else ():
            value = self._cell(row, other)
            if other != self.taken["boxes"] and not is_empty(value) and cell_value("boxes", value) != found["boxes"]:
                expected = f"what {other} holds, {show(value)} (a line boxes: COLUMN in a file for --map says which)"
                raise FieldError.wrong("boxes", expected, found["boxes"])

    def _nothing(self, row: Mapping[str, Any]) -> FieldError:
        """The error of a row that has none of the columns from which something is learned."""
        tasks = [name for name in self.taken if name in TASKS]
        looked = dict.fromkeys(
            one for name in tasks for one in (*_several(self.taken[name]), *self.others.get(name, ()))
        )
        filled = [str(column) for column in row if not is_empty(row[column])]
        expected = f"a value there{f' (or in {and_more})' if (and_more := ', '.join(list(looked)[1:])) else ''}"
        there = f"filled: {', '.join(filled)}" if filled else "no column is filled"
        seen = f"nothing ({there})"
        says = f"is empty, expected {expected}: nothing to learn from; {there}"
        return FieldError(Fault(tasks[0], seen, expected), says)

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
    mixed: bool = False,
) -> Columns:
    """What each column of a table is.

    Args:
        given: the map of `--map`, as `read_map` returns it.
        classes: columns of numbers that stand for names.
        inner: columns that hold objects, which a map may name fields of.
        mixed: rows are objects, each with fields of its own, not a table of which all rows have all columns.
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
    named = {n: several for n, several in _by_names(columns, used).items() if n not in given}
    taken = mapped | {name: several[0] if isinstance(several, list) else several for name, several in named.items()}
    further = {name: several[1:] for name, several in named.items() if isinstance(several, list)}
    _settle(taken, further, set(given), mixed)
    if not set(TASKS) & set(taken):
        raise UserError(
            f"none of the columns ({', '.join(columns)}) is known as a caption, a question and an answer, messages or "
            f"text: name them in a file for --map, such as caption: {columns[-1] if columns else 'words'}"
        )
    in_order = {name: taken[name] for name in FIELDS if name in taken}
    reads = used | {one for column in in_order.values() for one in _several(column)}
    others = {n: tuple(o for o in further[n] if o not in reads) for n in in_order if n in further and n != "key"}
    others = {name: several for name, several in others.items() if several}
    reads |= {one for several in others.values() for one in several}
    left = tuple(column for column in columns if column not in reads)
    return Columns(in_order, left, frozenset(mapped), classes or {}, style, box_format, others)


def _by_names(columns: Sequence[str], used: Collection[str]) -> dict[str, list[str] | tuple[str, ...]]:
    """Every field that columns have a name for, with these columns, the surest first, or with the columns of its parts;
    but columns that are used otherwise."""
    there: dict[str, str] = {}
    for column in columns:
        if column not in used:
            there.setdefault(re.sub(r"[\s-]+", "_", column.strip().lower()), column)
    found: dict[str, list[str] | tuple[str, ...]] = {}
    for name, names in NAMES.items():
        if several := [there[n] for n in names if n in there]:
            found[name] = several
    if "options" not in found and (parts := next(_option_columns(there), None)) is not None:
        found["options"] = parts
    return found


def _option_columns(there: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for form in OPTION_FORMS:
        cells = tuple(there[n] for letter in "abcdefghij" if (n := form.format(letter)) in there)
        if len(cells) > 1:
            yield cells


def _settle(taken: dict[str, Column], further: dict[str, list[str]], given: Collection[str], mixed: bool) -> None:
    """Leave out what is a field only beside others, and what is said twice; a map's fields stay.

    Args:
        further: field -> columns that stand in for its own where a row lacks that.
        mixed: what is said twice is left to each row.
    """

    def drop(*names: str) -> None:
        for name in names:
            if name not in given:
                taken.pop(name, None)

    media = [name for name in MEDIA if name in taken]
    if [name for name in media if name != "file"]:
        drop("file")
    if "images" in taken and not mixed:
        drop("image")
    if set(CHATS) & set(taken):
        drop("question", "answer", "text", "caption", "options")
    if "messages" in taken:
        drop("conversations")
    if "answer" not in taken and "answer_idx" not in taken:
        drop("question", "options")
    if ("points" in taken and not mixed) or ("label" not in taken and set(TASKS) & set(taken) - {"boxes"}):
        drop("boxes")
    for name, other in (*ONLY_BESIDE.items(), *ONLY_BESIDE.items()):  # twice, as one may depend on another
        if not set([other] if isinstance(other, str) else other) & set(taken):
            drop(name)
    tasks = set(TASKS) & set(taken) - {"text"}
    if "text" in taken and "text" not in given and (tasks or media):
        column, rest = taken.pop("text"), further.pop("text", [])
        if not tasks:
            taken["caption"], further["caption"] = column, rest
        elif "caption" in taken and "caption" not in given and media and isinstance(column, str):
            further.setdefault("caption", []).extend([column, *rest])


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
