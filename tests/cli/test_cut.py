"""Pictures that are cut off, asked about: said with their names, or refused where the run does not read them."""

from __future__ import annotations

import json

import pytest

from data_prep import demo
from molmo2_nemo.cli.main import main
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.schema import to_yaml

CALLS = [("ask", "start", "?", "--image", "whole.jpg", "--image", "cut.jpg"), ("generate", "start", "prompts.jsonl")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkpoint that is none, which is found out after the media have been looked at."""
    monkeypatch.chdir(tmp_path)
    whole = (demo.MEDIA / "cat.jpg").read_bytes()
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    prompts = [{"question": "?", "image": "whole.jpg"}, {"question": "?", "image": ["whole.jpg", "cut.jpg"]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (tmp_path / "start" / "weights").mkdir(parents=True)
    return tmp_path


def said(call, capsys):
    assert main(list(call)) == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_cut_pictures_are_said_once_with_their_names(call, place, capsys):
    for run in (None, ["data.image.truncated=load"]):
        if run is not None:
            (place / "start" / "config.yaml").write_text(to_yaml(compose(run)))
        warning, error = said(call, capsys)
        assert warning == (
            "warning: cut.jpg: cut off or damaged inside; loaded as far as it goes (data.image.truncated=load)"
        )
        assert error.startswith("molmo2: error: start")


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_a_run_that_does_not_read_them_is_not_shown_them(call, place, capsys):
    (place / "start" / "config.yaml").write_text(to_yaml(compose(["data.image.truncated=skip"])))
    (error,) = said(call, capsys)
    assert error.startswith("molmo2: error: cut.jpg: cut off or damaged inside") and "truncated=skip" in error
