"""The image and text sets of the published mixture and of the registry are the same, group by group."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data_prep.sources.base import Hub, Manual, Source

CONF = Path(__file__).parents[3] / "conf" / "data"
MODULES = ("pixmo", "cosyn", "image_multi", "image_academic", "image_manual", "text")
GROUPS = {
    "pretrain": {"captions", "pointing", "text"},
    "sft": {"demo", "image_academic", "image_pointing", "nlp", "hardcodes"},
}
VIDEOS = {"molmo2_human_qa", "molmo2_captions"}  # of the group demo


def sources() -> Iterator[Source]:
    for module in MODULES:
        yield from importlib.import_module(f"data_prep.sources.{module}").SOURCES


@pytest.mark.parametrize("stage", GROUPS)
def test_names_and_groups(stage):
    configured = yaml.safe_load((CONF / f"molmo2_{stage}.yaml").read_text(encoding="utf-8"))["sources"]
    wanted = {name: c["group"] for name, c in configured.items() if c["group"] in GROUPS[stage] and name not in VIDEOS}
    assert {source.name: source.mixes[stage] for source in sources() if stage in source.mixes} == wanted


def test_every_source_says_what_people_need():
    for source in sources():
        assert source.kind and source.licence and source.mixes, source.name
        if isinstance(source.origin, Manual):
            assert source.origin.fetch and source.origin.media and source.origin.tables, source.name
            assert "https://" in source.origin.fetch, source.name
        elif any(kind in (str, [str]) and column in ("image", "images") for column, kind in source.fields.items()):
            assert isinstance(source.origin, Hub)
            assert source.origin.media or "Images come from" in source.notes, f"{source.name}: where are the images?"
