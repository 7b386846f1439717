"""Lists of strings read out of somebody's Python source by parsing: nothing of it is imported or run.

Understood are literals, sums, slices of what is known, f-strings over a function's parameters, simple list
comprehensions and a few methods of strings. Anything else is an error when that name is asked for.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import DataError, UserError, read_text

LARGEST = 4 * 2**20  # characters of a file that is read
LONGEST = 10_000  # items of a list
STRING_METHODS = {"replace": 2, "strip": 0, "lstrip": 0, "rstrip": 0, "lower": 0}  # and their arguments
CONSTANTS = {"ascii_uppercase": string.ascii_uppercase, "ascii_lowercase": string.ascii_lowercase}
Names = Mapping[str, Any]


class SourceFile:
    """The names that one Python file assigns, and what its functions would return, as far as they can be read."""

    def __init__(self, path: Path) -> None:
        """Raises UserError: not a file of Python that can be parsed."""
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        text = read_text(path)
        if len(text) > LARGEST or "\0" in text:
            what = "a NUL byte" if "\0" in text else f"{len(text):,} characters, at most {LARGEST:,} are read"
            raise DataError(f"{path}: cannot be parsed as Python: {what}")
        try:
            self.tree = ast.parse(text, str(path))
        except (SyntaxError, RecursionError, MemoryError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
            raise DataError(f"{path}{line}: cannot be parsed as Python: {error}") from None
        self.names: dict[str, Any] = {}
        self._unread: dict[str, DataError] = {}
        _assign(self.tree.body, self.names, self._unread)

    def value(self, name: str) -> Any:
        """What the file's top level assigns to a name.

        Raises:
            DataError: nothing, or something that cannot be read as data; names file and line.
        """
        if name in self._unread:
            raise DataError(f"{self.path}: {self._unread[name]}")
        if name not in self.names:
            raise DataError(f"{self.path}: nothing is assigned to {name}")
        return self.names[name]

    def unread(self, name: str) -> DataError | None:
        """Why a name, or an entry such as `NAME[key]`, could not be read; None where it could."""
        return self._unread.get(name)

    def returned(self, function: str, *placeholders: str) -> Any:
        """What a function returns whose parameters stand for `{placeholder}`, in their order."""
        return self._in(function, placeholders, self._returned)

    def local(self, function: str, variable: str, *placeholders: str, iterated: bool = False) -> list[Any]:
        """The values assigned to a variable inside a function, and those added to it, in the order of the lines.

        Args:
            iterated: the value is a list comprehension; what it runs over is wanted.
        """

        def read(node: ast.FunctionDef, names: Names) -> list[Any]:
            found = []
            for part in ast.walk(node):
                if isinstance(part, ast.Assign | ast.AugAssign):
                    target = _target(part)
                    if isinstance(target, ast.Name) and target.id == variable:
                        found.append((part.lineno, part.value))
            if not found:
                raise Unreadable(node, f"{function}() assigns nothing to {variable}")
            values = [value for _, value in sorted(found, key=lambda item: item[0])]
            return [evaluate(_iterable(value) if iterated else value, names) for value in values]

        return self._in(function, placeholders, read)

    def classes(self) -> list[ast.ClassDef]:
        return [node for node in self.tree.body if isinstance(node, ast.ClassDef)]

    def _returned(self, node: ast.FunctionDef, names: Names) -> Any:
        for part in node.body:
            if isinstance(part, ast.Return) and part.value is not None:
                return evaluate(part.value, names)
        raise Unreadable(node, f"{node.name}() returns nothing at its end")

    def _in(self, function: str, placeholders: tuple[str, ...], read: Callable[[ast.FunctionDef, Names], Any]) -> Any:
        found = [n for n in self.tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
        if not found:
            raise DataError(f"{self.path}: there is no function {function}")
        given = dict(zip((a.arg for a in found[-1].args.args), placeholders, strict=False))
        try:
            return read(found[-1], {**self.names, **{name: f"{{{text}}}" for name, text in given.items()}})
        except (Unreadable, RecursionError) as error:
            raise DataError(f"{self.path}: {error}") from None


class Unreadable(DataError):
    """An expression that is more than data; the message has its line."""

    def __init__(self, node: Any, text: str) -> None:
        super().__init__(f"line {getattr(node, 'lineno', '?')}: {text}")


def assigned_in(node: ast.ClassDef, name: str) -> list[str] | None:
    """A list of strings that a class assigns to a name; None where it assigns none.

    Raises:
        DataError: it assigns something else.
    """
    for part in node.body:
        target = _target(part)
        if isinstance(target, ast.Name) and target.id == name and isinstance(part, ast.Assign):
            return strings(evaluate(part.value, {}), part)
    return None


def strings(value: Any, node: Any) -> list[str]:
    """The value, which has to be a list of strings."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Unreadable(node, "expected a list of strings")
    return value


def _target(node: Any) -> ast.expr | None:
    """What `X = ...` or `X += ...` assigns to."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        return node.targets[0]
    return node.target if isinstance(node, ast.AugAssign) else None


def _assign(body: list[ast.stmt], names: dict[str, Any], unread: dict[str, DataError]) -> None:
    """Follow the top-level assignments `NAME = ...`, `NAME += ...` and `NAME[key] = ...`."""
    for node in body:
        target = _target(node)
        if target is None:
            continue
        shown = ast.unparse(target).replace('"', "'")
        try:
            value = evaluate(node.value, names)  # type: ignore[attr-defined]
            if isinstance(node, ast.AugAssign):
                value = _sum(evaluate(target, names), value, target)
            _store(target, value, names)
            unread.pop(shown, None)
        except (Unreadable, RecursionError) as error:
            unread[shown] = error if isinstance(error, DataError) else Unreadable(node, str(error))


def _store(target: ast.expr, value: Any, names: dict[str, Any]) -> None:
    if isinstance(target, ast.Name):
        names[target.id] = value
    elif isinstance(target, ast.Subscript):
        table, key = evaluate(target.value, names), evaluate(target.slice, names)
        if not isinstance(table, dict) or not isinstance(key, str):
            raise Unreadable(target, "only entries of a dictionary are followed")
        table[key] = value


def _iterable(node: ast.expr) -> ast.expr:
    return node.generators[0].iter if isinstance(node, ast.ListComp) else node


def evaluate(node: ast.expr, names: Names) -> Any:
    """The value of an expression that is data.

    Raises:
        Unreadable: it is more than that.
    """
    match node:
        case ast.Constant(value):
            return value
        case ast.Name(id) if id in names:
            return names[id]
        case ast.List(items) | ast.Tuple(items):
            return [evaluate(item, names) for item in items]
        case ast.Dict(keys, values) if all(isinstance(k, ast.Constant) and isinstance(k.value, str) for k in keys):
            pairs = zip(keys, values, strict=True)
            return {k.value: evaluate(v, names) for k, v in pairs if isinstance(k, ast.Constant)}
        case ast.BinOp(left, ast.Add(), right):
            return _sum(evaluate(left, names), evaluate(right, names), node)
        case ast.Subscript(value, index):
            return _item(evaluate(value, names), evaluate(index, names), node)
        case ast.JoinedStr(parts):
            return "".join(_piece(part, names) for part in parts)
        case ast.ListComp(element, [ast.comprehension(ast.Name(id), over, conditions, 0)]):
            rows = [{**names, id: item} for item in _some(evaluate(over, names), node)]
            return [evaluate(element, row) for row in rows if all(evaluate(c, row) for c in conditions)]
        case ast.Compare(left, [ast.NotEq() | ast.Eq() as kind], [right]):
            return (evaluate(left, names) == evaluate(right, names)) is isinstance(kind, ast.Eq)
        case ast.Attribute(ast.Name("string"), name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.Call(function, arguments, []):
            return _called(function, [evaluate(a, names) for a in arguments], names, node)
    raise Unreadable(node, f"{ast.unparse(node)[:60]!r} cannot be read as data")


def _called(function: ast.expr, arguments: list[Any], names: Names, node: ast.expr) -> Any:
    match function, arguments:
        case ast.Name("sorted" | "set" | "list"), [items] if all(isinstance(item, str) for item in _some(items, node)):
            return set(items) if function.id == "set" else sorted(items) if function.id == "sorted" else list(items)
        case ast.Name("str"), [str() | int() as value]:
            return str(value)
        case ast.Name("range"), [*ends] if 1 <= len(ends) <= 2 and all(type(end) is int for end in ends):
            return list(_some(range(*ends), node))
        case ast.Attribute(owner, method), _ if method in STRING_METHODS:
            return _method(evaluate(owner, names), method, arguments, node)
    raise Unreadable(node, f"{ast.unparse(node)[:60]!r} cannot be read as data")


def _method(text: Any, method: str, arguments: list[Any], node: ast.expr) -> str:
    """A method of strings, with as many arguments as STRING_METHODS says."""
    if not all(isinstance(value, str) for value in (text, *arguments)) or len(arguments) != STRING_METHODS[method]:
        raise Unreadable(node, f"{ast.unparse(node)[:60]!r} cannot be read as data")
    if len(text) * max([1, *map(len, arguments)]) > LARGEST:
        raise Unreadable(node, "too long")
    return str(getattr(text, method)(*arguments))


def _some(items: Any, node: ast.expr) -> Any:
    """The items of a list, of a set or of a range, if they are not very many."""
    if not isinstance(items, (list, set, range)) or len(items) > LONGEST:
        raise Unreadable(node, f"expected a list of at most {LONGEST:,} items")
    return items


def _sum(left: Any, right: Any, node: ast.expr) -> Any:
    if isinstance(left, str) and isinstance(right, str) and len(left) + len(right) <= LARGEST:
        return left + right
    if isinstance(left, list) and isinstance(right, list) and len(left) + len(right) <= LONGEST:
        return left + right
    raise Unreadable(node, "only two lists or two strings are added, which are not too long")


def _item(table: Any, index: Any, node: ast.expr) -> Any:
    if isinstance(table, dict) and isinstance(index, str) and index in table:
        return table[index]
    raise Unreadable(node, f"there is no entry {index!r}")


def _piece(node: ast.expr, names: Names) -> str:
    """A part of an f-string: text, or a value put in as it is."""
    if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
        value = evaluate(node.value, names)
    else:
        value = evaluate(node, names)
    if not isinstance(value, str):
        raise Unreadable(node, f"{ast.unparse(node)[:60]!r} is not text")
    return value
