"""Settings under the names that they once had."""

from __future__ import annotations

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.settings import renamed
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import by_dotted_key, load_yaml, to_dict, to_yaml

ANSWER = "parallel.context_exchange is now called parallel.cp_comm_type, and read as that"


@pytest.fixture(autouse=True)
def nothing_answered_yet(monkeypatch):
    monkeypatch.setattr(renamed, "_answered", set())


def test_every_new_name_exists_and_no_old_one():
    known = by_dotted_key(to_dict(RunConfig()))
    assert all(new in known and old not in known for old, new in renamed.RENAMED.items())


def test_on_the_command_line(capsys):
    for _ in range(2):
        cfg = compose(["recipe=tiny", "parallel.context_exchange=all_gather"])
        assert cfg.parallel.cp_comm_type == "all_gather"
    out, err = capsys.readouterr()
    assert (out, err) == ("", ANSWER + "\n")  # once


def test_in_the_configuration_of_an_old_run(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(RunConfig()).replace("cp_comm_type: ring", "context_exchange: all_gather"))
    assert load_yaml(path).parallel.cp_comm_type == "all_gather"
    assert capsys.readouterr().err == f"{path}: {ANSWER}\n"


def test_in_a_file_of_ones_own(tmp_path, capsys):
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "mine.yaml").write_text(
        "# @package _global_\nparallel: {context: 4, context_ulysses: 2, context_exchange: all_gather}\n"
    )
    given = ["recipe=tiny", "parallel=mine"]
    assert compose(given, tmp_path).parallel.cp_comm_type == "all_gather"
    assert capsys.readouterr().err == f"--config-dir {tmp_path}: {ANSWER}\n"
    # what stands on the command line wins, under either name
    assert compose([*given, "parallel.cp_comm_type=ring"], tmp_path).parallel.cp_comm_type == "ring"
    assert compose([*given, "parallel.context_exchange=ring"], tmp_path).parallel.cp_comm_type == "ring"
    for name in ("context_exchange", "cp_comm_type"):  # taken away: the default stays
        assert compose([*given, f"~parallel.{name}"], tmp_path).parallel.cp_comm_type == "ring"


def test_both_names_with_different_values(tmp_path):
    path = tmp_path / "config.yaml"
    text = to_yaml(RunConfig())
    path.write_text(text.replace("  cp_comm_type: ring\n", "  cp_comm_type: ring\n  context_exchange: ring\n"))
    assert load_yaml(path).parallel.cp_comm_type == "ring"
    path.write_text(text.replace("  cp_comm_type: ring\n", "  cp_comm_type: ring\n  context_exchange: all_gather\n"))
    with pytest.raises(UserError, match="under its old and its new name; remove parallel.context_exchange"):
        load_yaml(path)


def test_a_whole_group(monkeypatch, capsys):
    monkeypatch.setattr(renamed, "RENAMED", {"data.old": "data.new.inner", "gone": "kept"})
    assert renamed.new_name("data.old.x.y") == "data.new.inner.x.y"
    assert renamed.new_name("data.older") == "data.older"
    values = {"data": {"old": {"x": 1}, "z": 2}, "gone": None}
    wanted = {"data": {"new": {"inner": {"x": 1}}, "z": 2}, "kept": None}
    assert renamed.with_new_names(values, "f") == wanted and values["data"]["old"] == {"x": 1}
    assert capsys.readouterr().err.splitlines() == [
        "data.old is now called data.new.inner, and read as that",
        "f: gone is now called kept, and read as that",
    ]
