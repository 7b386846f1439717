"""Result files that are damaged, of another kind, or older than some fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.rundir.results import read_result, read_results

RESULT: dict[str, Any] = {
    "task": "count",
    "group": "point",
    "settings": {"frames": None},
    "score": 0.5,
    "questions": 4,
    "scores": {"point_count": {"score": 0.5, "answers": 4}},
}


def written(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize("more", [{}, {"score": None, "scores": {}}, {"score": 0}, {"score": 1}])
def test_a_result_is_read_as_it_was_written(tmp_path: Path, more: dict[str, Any]) -> None:
    assert read_result(written(tmp_path / "count.json", RESULT | more)) == RESULT | more


def test_one_without_newer_fields(tmp_path: Path) -> None:
    old = {name: RESULT[name] for name in ("task", "group", "settings", "scores")}
    assert read_result(written(tmp_path / "count.json", old)) == old


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (json.dumps(RESULT)[:-20], "Expecting"),
        ("", "Expecting"),
        ("[" * 100_000, "recursion"),
        ([1], "no object"),
        (RESULT | {"scores": []}, "scores is []"),
        (RESULT | {"scores": {"point_count": {"answers": 3}}}, "scores.point_count is"),
        (RESULT | {"scores": {"point_count": 0.5}}, "scores.point_count is 0.5"),
        (RESULT | {"score": "high"}, "score is 'high'"),
        (RESULT | {"score": float("nan")}, "score is nan"),
        (RESULT | {"settings": "x"}, "settings is 'x'"),
        (RESULT | {"task": None}, "task is None"),
        (RESULT | {"questions": "4"}, "questions is '4'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, value: Any, seen: str) -> None:
    path = written(tmp_path / "count.json", value)
    with pytest.raises(UserError, match="not a result of molmo2 evaluate, or damaged") as error:
        read_result(path)
    assert str(path) in str(error.value) and seen in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_left_out(tmp_path: Path) -> None:
    written(tmp_path / "needle_map.json", {"maps": []})
    written(tmp_path / "b.json", RESULT)
    written(tmp_path / "a@8.json", RESULT | {"task": "a"})
    assert list(read_results(tmp_path)) == ["a@8", "b"]
    assert read_results(tmp_path / "none") == {}
