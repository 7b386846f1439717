"""Which styles a question may be asked in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from data_prep import demo_records
from data_prep.sources.own import entry_sample
from molmo2_nemo.data.styles import asked_style, style_of
from molmo2_nemo.errors import UserError


def named(value: Any) -> Iterator[str]:
    """Every style in a tree of annotations."""
    if isinstance(value, dict):
        if isinstance(value.get("style"), str):
            yield value["style"]
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from named(part)


def test_styles_of_the_demo_and_of_the_short_forms_are_known():
    found = set(named([demo_records.pretrain(), demo_records.sft(), demo_records.long()]))
    for entry in ({"caption": "c"}, {"video": "a.mp4", "caption": "c"}, {"messages": ["a", "b"]}):
        found |= set(named(entry_sample(entry, "k").annotations))
    assert len(found) > 10 and [asked_style(style) for style in found] == list(found)


@pytest.mark.parametrize(
    "style",
    ["vqa2", "chart_qa", "cosyn_table_exp", "video_short_answer", "video_eval_short_answer", "eval_multi_image_mc"],
)
def test_styles_of_the_published_data_sets_and_their_evaluation_names(style):
    assert asked_style(style) == style


def test_ones_own_style_is_marked():
    assert asked_style("own:mine") == "mine"
    with pytest.raises(UserError, match="written own:mine"):
        asked_style("mine")


@pytest.mark.parametrize(("style", "explained"), [("cosyn_table_exp", True), ("a_exp_b", True), ("bird_expert", False)])
def test_exp_is_a_word_of_a_styles_name(style, explained):
    assert bool(style_of(style).question_wordings) == explained


@pytest.mark.parametrize("style", ["", " ", "own:", 7, None, ["user_qa"]])
def test_what_is_no_name(style):
    with pytest.raises(UserError):
        asked_style(style)


def test_a_slip_is_told_from_a_name():
    with pytest.raises(UserError, match="did you mean 'long_caption'"):
        asked_style("long_captoin")
