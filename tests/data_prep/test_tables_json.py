"""Rows of JSON files, read whole and streamed: the same rows, the same messages."""

import json

import pytest

from data_prep import tables
from data_prep.sources.base import SourceError, Table
from data_prep.tables import read_file

ROWS = [{"q": "wie groß?", "answer": 1.5, "n": 3, "more": {"x": [1, None]}}, {"q": "b", "answer": True}]


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def read(request, tmp_path, monkeypatch):
    if request.param:
        monkeypatch.setattr(tables, "WHOLE_JSON_BYTES", 0)

    def rows(content, **where):
        path = tmp_path / "rows.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return list(read_file(path, Table("rows.json", **where)))

    return rows


def test_lists_and_objects(read):
    assert read(ROWS) == ROWS
    assert read({"info": {"data": 1}, "data": {"train": ROWS}}, at=("data", "train")) == ROWS
    assert read({"a": ROWS[0], "b": "text"}, key="id") == [{**ROWS[0], "id": "a"}, {"value": "text", "id": "b"}]
    assert read({"x": {"a.b": ROWS[1]}}, at=("x",)) == [{**ROWS[1], "__key__": "a.b"}]
    assert read([]) == [] and read({"data": []}, at=("data",)) == []
    assert isinstance(read(ROWS)[0]["n"], int) and isinstance(read(ROWS)[0]["answer"], float)


def test_mistakes_are_named(read):
    with pytest.raises(SourceError, match=r"rows.json has no field 'data' \(there is: dates, list\)"):
        read({"dates": 1, "list": []}, at=("data",))
    with pytest.raises(SourceError, match="a row must be an object"):
        read([1, 2])
    with pytest.raises(SourceError, match="not a list of rows"):
        read({"data": 5}, at=("data",))
    with pytest.raises(SourceError, match=r"rows.json cannot be read"):
        read('[{"q": 1}, {"q": ')
