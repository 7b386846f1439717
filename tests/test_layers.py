"""Imports point down: a package uses those below it in LAYERS, never one above or itself in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1] / "molmo2_nemo"
LAYERS = (  # docs/code.md says what each is
    *("cli", "launch", "evaluation", "nemo", "plan", "preview", "convert", "cost", "rundir", "settings"),
    *("model", "attention", "parallel", "data", "cpu", "files", "processes", "errors"),
)


def imports() -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports, at its top or later."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}
    files = {name.removesuffix("__init__").removesuffix("."): path for name, path in files.items()}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names = found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
                names.add(str(node.module))
        ours = {name.removeprefix("molmo2_nemo.") for name in names if name.startswith("molmo2_nemo.")}
        found[module] = (ours & set(files)) - {module}
    return found


def test_imports_point_down():
    depth = {name: number for number, name in enumerate(LAYERS)}
    packages = {module: module.split(".")[0] for module in imports() if module}
    assert set(packages.values()) == set(LAYERS)
    upward = [
        f"{module} imports {used}"
        for module, names in imports().items()
        for used in names
        if module and packages[module] != packages[used] and depth[packages[module]] > depth[packages[used]]
    ]
    assert not upward


def test_no_file_imports_itself_in_a_circle():
    TopologicalSorter(imports()).prepare()  # raises CycleError and names the circle
