"""Tables that are named by a pattern in a repository of the Hub."""

import json

import huggingface_hub
import pytest

from data_prep.sources.base import SourceError, Table
from data_prep.tables import Tables


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The Hub as a folder: what its client library would list and fetch."""
    for name in ("a", "b"):
        (tmp_path / f"rows-{name}.jsonl").write_text(json.dumps({"name": name}) + "\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("card", encoding="utf-8")
    listed = ["rows-b.jsonl", "README.md", "rows-a.jsonl"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, **more: listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, path, **more: str(tmp_path / path))


def test_all_files_that_fit_in_order_of_name(repository):
    rows = list(Tables().rows(Table("rows-*.jsonl", repo="who/what")))
    assert [(row["name"], row["__table__"]) for row in rows] == [("a", "rows-a.jsonl"), ("b", "rows-b.jsonl")]
    with pytest.raises(SourceError, match=r"who/what has no file \*.csv \(there are: README.md, rows-a"):
        list(Tables().rows(Table("*.csv", repo="who/what")))


def test_a_copy_below_the_source_goes_first(repository, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "rows-c.jsonl").write_text('{"name": "c"}\n', encoding="utf-8")
    assert [row["name"] for row in Tables((copy,)).rows(Table("rows-*.jsonl", repo="who/what"))] == ["c"]
