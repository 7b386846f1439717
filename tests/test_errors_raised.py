"""What a user can get wrong is raised as a UserError: the command shows those as one line, everything else is a fault
of ours and ends with a traceback."""

from __future__ import annotations

import ast
import inspect
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
                assert not bases & USERS or node.name == "Preempted", f"{path}:{node.lineno} {node.name}"


def test_errors_of_data_and_conversion_are_the_users():
    for kind in (errors.DataError, errors.ConversionError):
        assert issubclass(kind, errors.UserError) and issubclass(kind, ValueError)
        assert inspect.getmodule(kind) is errors
