"""The video sets of the published mixture and of the registry are the same, name by name."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from data_prep.sources.base import Hub, Manual, Source

CONF = Path(__file__).parents[3] / "conf" / "data" / "molmo2_sft.yaml"
MODULES = (
    "molmo2_video",
    "video_academic_hub",
    "video_academic_qa",
    "video_academic_clips",
    "video_academic_labels",
    "video_points",
    "tracking",
)
GROUPS = {"video_academic", "video_pointing", "tracking"}
DEMO = {"molmo2_human_qa", "molmo2_captions"}
# Names of the released mixture for what the registry calls otherwise; the first two it cannot resolve.
PUBLISHED = {
    "molmo2_syn_captions_qa": "vixmo_syn_video_capqa_v2",
    "molmo2_syn_captions_subtitle_qa": "vixmo_syn_video_capqa_with_sub_v2",
    "molmo2_captions": "vixmo3_top_level_captions_min_3",
    "molmo2_video_point_minmax_0_5": "vixmo_points_minmax_0_5",
    "molmo2_video_point_minmax_6_25": "vixmo_points_minmax_6_25",
    "molmo2_video_point_minmax_26_60": "vixmo_points_minmax_26_60",
    "academic_video_points": "academic_points_clip_63s_2fps",
}


def sources() -> Iterator[Source]:
    for module in MODULES:
        yield from importlib.import_module(f"data_prep.sources.{module}").SOURCES


def test_names_and_groups():
    configured = yaml.safe_load(CONF.read_text(encoding="utf-8"))["sources"]
    wanted = {name: c["group"] for name, c in configured.items() if c["group"] in GROUPS or name in DEMO}
    assert {source.name: source.mixes["sft"] for source in sources()} == wanted
    assert sum(group == "video_academic" for group in wanted.values()) == 34


def test_names_of_the_released_mixture():
    assert {source.name: source.published_as for source in sources() if source.published_as} == PUBLISHED
    unresolvable = {source.name for source in sources() if not source.resolvable}
    assert unresolvable == {"molmo2_syn_captions_qa", "molmo2_syn_captions_subtitle_qa"}


def test_every_source_says_what_people_need():
    for source in sources():
        assert source.kind.startswith("video") and source.licence and source.fields, source.name
        if isinstance(source.origin, Manual):
            assert source.origin.media and source.origin.tables, source.name
            assert "https://" in source.origin.fetch or "hub" in source.origin.fetch, source.name
        else:
            assert isinstance(source.origin, Hub) and source.origin.media, source.name
