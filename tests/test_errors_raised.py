"""What a user can get wrong is raised as a UserError: the command shows those as one line, everything else is a fault
of ours and ends with a traceback."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo import errors

ROOT = Path(__file__).parents[1]
USERS = {  # builtin errors that read as if the user could mend them; nothing of ours raises them
    *("ValueError", "OSError", "IOError", "EnvironmentError", "FileNotFoundError", "FileExistsError"),
    *("NotADirectoryError", "IsADirectoryError", "PermissionError", "UnicodeError", "Exception"),
}


def raised() -> list[tuple[str, str]]:
    """(place, name) of every `raise` of an error by its name, with or without arguments."""
    found = []
    for path in sorted([*(ROOT / "molmo2_nemo").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                if isinstance(error, ast.Name):
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", error.id))
    return found


def test_nothing_raises_a_builtin_error_for_the_user():
    seen = raised()
    assert sum(name == "UserError" for _, name in seen) > 100  # the search finds what is there
    assert [f"{place} raises {name}" for place, name in seen if name in USERS] == []


def test_every_error_class_for_the_user_is_a_user_error():
    """Subclasses of ValueError that the packages define go through UserError."""
    for path in [*(ROOT / "molmo2_nemo").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and (path.name, node.name) != ("errors.py", "UserError"):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                allowed = node.name in ("Preempted", "NotNow")  # caught inside the package
                assert not bases & USERS or allowed, f"{path}:{node.lineno} {node.name}"


def test_errors_of_data_and_conversion_are_the_users():
    for kind in (errors.DataError, errors.ConversionError):
        assert issubclass(kind, errors.UserError) and issubclass(kind, ValueError)
        assert inspect.getmodule(kind) is errors


BROAD = {"ValueError", "TypeError"}  # a fault of ours raises these too
PARSERS = {
    "loads",
    "int",
    "float",
    "literal_eval",
    "find_spec",
    "fromisoformat",
    "parsedate_to_datetime",
    "Version",
    "urlsplit",
}  # raise them for what they are given
CAUGHT = {  # handlers of these around something else than a parser: what is in the `try` that is not ours
    "data_prep/record_builder.py build": "a sample that our code did not expect is skipped and said to be unforeseen",
    "molmo2_nemo/data/check.py _context": "a user's sampling, whatever its values make of the times",
    "data_prep/media.py _lettered": "Pillow: what it raises for a broken image depends on where it breaks",
    "data_prep/record_builder.py _build": "json.dumps, of what a source made of a row",
    "data_prep/tables.py count": "Arrow, and files that others wrote",
    "data_prep/transcode.py cut_packets": "PyAV: a codec that an mp4 cannot hold, packets without a time",
    "molmo2_nemo/evaluation/hub_tables.py questions": "a row of a table that others made, of whatever shape",
    "molmo2_nemo/evaluation/published_videos.py questions": "a row of a table that others made, of whatever shape",
    "molmo2_nemo/evaluation/video_choice.py open": "a row of a table that others made, of whatever shape",
    "molmo2_nemo/data/tokenizer.py encode": "the library's, for lone surrogates",
}


def catches() -> Iterator[tuple[str, bool]]:
    """(file and function, whether a parser is called in the `try`) of every handler of a broad error."""
    for path in sorted([*(ROOT / "molmo2_nemo").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Try) and any(BROAD & _names(handler.type) for handler in node.handlers):
                    called = set().union(*map(_calls, node.body))
                    yield f"{path.relative_to(ROOT)} {function.name}", bool(called & PARSERS)


def _names(caught: ast.expr | None) -> set[str]:
    return {part.id for part in ast.walk(caught) if isinstance(part, ast.Name)} if caught is not None else set()


def _calls(body: ast.stmt) -> set[str]:
    """The last part of the name of everything that is called."""
    called = [part.func for part in ast.walk(body) if isinstance(part, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else f.id for f in called if isinstance(f, ast.Attribute | ast.Name)}


def test_a_fault_of_ours_is_not_caught_as_the_users():
    """`except ValueError` stands around a parser of what the user gave, or is listed with its reason; where only our
    code runs, `except UserError`."""
    assert {place for place, parses in catches() if not parses} == set(CAUGHT)
    assert sum(parses for _, parses in catches()) > 10  # the search finds what is there
