"""`molmo2 prepare --list` and the published mixture agree, name by name."""

from __future__ import annotations

import sys

import pytest

from data_prep import listing
from data_prep.sources import MODULES, all_sources, find_source
from data_prep.sources.base import Hub, Manual
from molmo2_nemo.cli.main import main
from molmo2_nemo.cli.prepare import _wanted
from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.compose import compose

# in no mixture of Molmo2
OPTIONAL = {"molmo_point_track_any", "molmo_point_track_syn", "shot2story", "lvd_2m", "videomarathon"}


def mixture(stage):
    return {name: source.group for name, source in compose(["recipe=4b", f"stage={stage}"]).data.sources.items()}


@pytest.mark.parametrize("stage, mix", [("pretrain", "pretrain"), ("sft", "sft"), ("long", "sft")])
def test_names_and_groups_are_those_of_the_mixture(stage, mix):
    known = {name: source.mixes[mix] for name, source in all_sources().items() if mix in source.mixes}
    assert known == mixture(stage)


def test_every_source_is_in_a_mixture_and_says_what_it_needs():
    for source in all_sources().values():
        assert bool(source.mixes) != (source.name in OPTIONAL) and set(source.mixes) <= {"pretrain", "sft"}, source.name
        assert source.licence and source.kind and source.fields and source.counts_as >= 1, source.name
        if isinstance(source.origin, Hub):
            assert source.origin.repo.count("/") == 1, source.name
        else:
            assert isinstance(source.origin, Manual) and source.origin.fetch and source.origin.tables, source.name


def test_a_recipe_needs_all_of_them():
    """`molmo2 prepare recipe=4b` means the data sets of its three stages, each once."""
    assert {source.name for source in _wanted(["recipe=4b", "tulu4"])} == set(mixture("pretrain")) | set(mixture("sft"))
    with pytest.raises(UserError, match="recipe=tiny trains on demo"):
        _wanted(["recipe=tiny"])


# Reference: names of the released mix that are another's in the registry, and those its registry does not know.
PUBLISHED = {
    "vixmo3_top_level_captions_min_3": "molmo2_captions",
    "vixmo_syn_video_capqa_v2": "molmo2_syn_captions_qa",
    "vixmo_syn_video_capqa_with_sub_v2": "molmo2_syn_captions_subtitle_qa",
    "vixmo_points_minmax_0_5": "molmo2_video_point_minmax_0_5",
    "vixmo_points_minmax_6_25": "molmo2_video_point_minmax_6_25",
    "vixmo_points_minmax_26_60": "molmo2_video_point_minmax_26_60",
    "academic_points_clip_63s_2fps": "academic_video_points",
}
UNRESOLVABLE = {"molmo2_syn_captions_qa", "molmo2_syn_captions_subtitle_qa"}


def test_published_names_lead_to_their_data_sets(capsys):
    assert {s.published_as: s.name for s in all_sources().values() if s.published_as} == PUBLISHED
    assert {s.name for s in all_sources().values() if not s.resolvable} == UNRESOLVABLE
    for published, name in PUBLISHED.items():
        assert find_source(published) is all_sources()[name]
    assert main(["prepare", "--list"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split()[0] for line in shown.splitlines() if line[:1].strip() and " stands for " not in line]
    assert all(rows.count(name) == 1 for name in all_sources())
    for published, name in PUBLISHED.items():
        assert f"{name} stands for {published}" in shown
    assert shown.count("that the released registry cannot resolve") == len(UNRESOLVABLE)
    with pytest.raises(UserError, match="did you mean 'pixmo_cap'"):
        find_source("pixmo_kap")


@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_fits_its_columns(columns, capsys, monkeypatch):
    """A row for each data set, and no cell is cut or broken inside a word."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["prepare", "--list"]) == 0
    head, *rows = capsys.readouterr().out.split("Stages 2 and 3")[0].splitlines()
    assert max(map(len, [head, *rows])) <= columns and ("licence" in head) == (columns == 200)
    named = {row.split()[0]: row.split() for row in rows if not row.startswith(" ")}
    assert set(named) == set(all_sources())
    for source in all_sources().values():
        assert set(source.mixes.values()) <= set(named[source.name])
    if columns == 80:
        assert len(rows) == len(named)


def test_details_say_where_everything_comes_from(capsys):
    names = list(all_sources())
    assert main(["prepare", "--list", *names]) == 0
    shown = capsys.readouterr().out
    for source in all_sources().values():
        assert f"\n{source.name}\n" in f"\n{shown}"
        text = listing.details(source)
        assert source.licence in text and all(f"    {field}: " in text for field in source.fields)
        tables = source.origin.tables if isinstance(source.origin, Manual) else ()
        assert all(table.path in text for table in tables)
        if isinstance(source.origin, Hub):
            assert source.origin.repo in text and source.origin.media in text


VALIDATION = {
    "doc_qa": "from val_v1.0_withQT.json",
    "tabwmp_da": "from problems_dev.json",
    "chart_qa_weighted": "from split val",
    "okvqa": "from configuration validation, split train",
    "st_qa": "what training leaves out of the same file",
    "pixmo_cap": "what training leaves out of the same rows",
}


@pytest.mark.parametrize("name", VALIDATION)
def test_details_say_where_the_validation_split_is(name, capsys):
    assert main(["prepare", "--list", name]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  validation "))
    assert said == f"  validation --split validation, to {name}-validation; {VALIDATION[name]}"


def test_listing_imports_nothing_heavy():
    """Looking a source up needs neither torch nor the libraries that load data."""
    import subprocess

    code = "import sys; from data_prep.sources import all_sources; all_sources(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "nemo", "datasets", "pyarrow", "av", "PIL", "lhotse", "huggingface_hub"} & set(loaded)
    assert len(MODULES) == len(set(MODULES))
