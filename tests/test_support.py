"""Tests take what they share from tests/support. Benchmarks are needed only by tests of benchmarks, and where their
training steps run on the virtual GPU."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
OF_BENCHMARKS = ("benchmarks", "virtual_gpu")


def test_only_tests_of_benchmarks_import_them():
    found = [
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and path.relative_to(TESTS).parts[0] not in OF_BENCHMARKS
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.split(".")[0] == "benchmarks"
    ]
    assert found == []
