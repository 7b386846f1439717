"""The published mixes: groups, sizes, overrides, and what happens where data sets are missing."""

import math

import pytest
from rich.console import Console

from molmo2_nemo.cli.mixture import render
from molmo2_nemo.data.config import DataConfig, SourceConfig
from molmo2_nemo.data.mixture import normalised_rates
from molmo2_nemo.data.reader import ExampleReader
from molmo2_nemo.data.sampling import effective_size, group_shares, is_missing, mixture_table, weights
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.errors import DataError
from molmo2_nemo.settings.compose import compose

PUBLISHED = {  # per cent of all examples
    "demo": 13.64,
    "video_academic": 18.18,
    "image_academic": 22.73,
    "tracking": 13.64,
    "video_pointing": 13.64,
    "image_pointing": 9.09,
    "nlp": 9.05,
    "hardcodes": 0.045,
}
MEMBERS = {"demo": 6, "video_academic": 34, "image_academic": 32, "tracking": 35, "video_pointing": 4}
MEMBERS |= {"image_pointing": 5, "nlp": 1, "hardcodes": 1}


def records(name, source=None):
    """A made-up but fixed number of records for every data set."""
    return 1000 + 37 * sum(map(ord, name))


@pytest.fixture(scope="module")
def sft():
    return compose(["recipe=8b", "stage=sft"]).data


@pytest.fixture(scope="module")
def shares(sft):
    found = weights(sft.sources, sft.groups, records)
    total = math.fsum(found.values())
    return {name: weight / total for name, weight in found.items()}


def write(folder, count):
    content = b'{"annotations": [{"style": "user_qa", "question": "q", "answer": "a"}]}'
    write_shards(folder, ((f"r{i}", {"json": content}) for i in range(count)))
    return str(folder)


def test_group_shares_are_the_published_ones(sft, shares):
    assert sum(sft.groups.values()) == pytest.approx(1.10)
    for group, percent in PUBLISHED.items():
        members = [name for name, source in sft.sources.items() if source.group == group]
        assert len(members) == MEMBERS[group]
        assert 100 * math.fsum(shares[n] for n in members) == pytest.approx(percent, abs=0.006)
        assert 100 * group_shares(sft.sources, sft.groups)[group] == pytest.approx(percent, abs=0.006)


def test_video_pointing_shares_are_exact(shares):
    names = [f"molmo2_video_point_minmax_{r}" for r in ("0_5", "6_25", "26_60")] + ["academic_video_points"]
    assert [round(100 * shares[n], 2) for n in names] == [5.45, 4.09, 1.36, 2.73]


def test_tracking_subgroups_multiply_each_size(sft, shares):
    subgroups = {}
    for name, source in sft.sources.items():
        if source.group == "tracking":
            subgroups.setdefault(
                (source.rate, name.rsplit("_", 1)[1] if "single" not in name else "single"), []
            ).append(name)
    sizes = {k: len(v) for k, v in subgroups.items()}
    assert sizes == {(0.4, "track"): 6, (0.05, "track"): 4, (0.2, "ground"): 5, (0.01, "ground"): 2} | {
        (0.15, "single"): 5,
        (0.2, "single"): 4,
        (0.1, "single"): 9,
    }
    # The published factors are W / 1.11; the constant cancels inside the group.
    by_hand = {}
    for (factor, _), names in subgroups.items():
        for name in names:
            size = 30000 if name.startswith("vicas") else records(name)
            by_hand[name] = factor / 1.11 * math.sqrt(size)
    total = sum(by_hand.values())
    for name, size in by_hand.items():
        assert shares[name] == pytest.approx(0.15 / 1.10 * size / total)


def test_overrides(sft):
    for source in sft.sources.values():
        pointing = source.group in ("tracking", "video_pointing", "image_pointing")
        assert source.p_high_res == (0.3 if source.group == "image_pointing" else None)
        if pointing:
            assert source.weight == 0.2
    flat = {
        n: s.weight for n, s in sft.sources.items() if s.group not in ("tracking", "video_pointing", "image_pointing")
    }
    assert {n: w for n, w in flat.items() if w is not None} == {"molmo2_captions": 0.1}
    factors = {n: s.size_factor for n, s in sft.sources.items() if s.size_factor and s.group != "video_pointing"}
    assert factors == {
        "pixmo_cap": 100000,
        **dict.fromkeys(("tgif", "tvqa_with_sub", "paxion", "moments_in_time_qa", "kinetics_qa"), 60000),
        **{"dv_qa": 10000, "figure_qa": 10000, "plot_qa": 20000, "pixmo_multi_points": 200000},
        **dict.fromkeys((f"vicas_{kind}" for kind in ("track", "ground", "single_point_track")), 30000),
    }
    assert sft.sources["molmo2_captions"].rate == 1.5
    assert compose(["recipe=8b", "stage=long"]).data.sources == sft.sources


def test_stage_one():
    data = compose(["recipe=4b", "stage=pretrain"]).data
    assert group_shares(data.sources, data.groups) == pytest.approx({"captions": 0.6, "pointing": 0.3, "text": 0.1})
    assert {s.weight for s in data.sources.values()} == {None}
    found = weights(data.sources, data.groups, lambda name, _: {"cosyn_point": 400}.get(name, 100))
    assert found["cosyn_point"] == pytest.approx(0.3 * 20 / 50) and found["pixmo_count_train"] == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("factor", "count", "size"),
    [(None, 40000, 200), (0, 40000, 1), (0.25, 40000, 100), (1, 40000, 1), (90000, 40000, 300), (10000, None, 100)]
    + [(None, None, None), (0.5, None, None)],
)
def test_effective_size(factor, count, size):
    assert effective_size(factor, count) == size


def test_worked_group():
    lengths = {"a": 40000, "b": 10000, "c": 5}
    sources = {n: SourceConfig(group="g", size_factor=90000 if n == "c" else None) for n in lengths}
    found = weights(sources, {"g": 1.0}, lambda name, _: lengths[name])
    assert [round(found[n], 3) for n in "abc"] == [0.333, 0.167, 0.5]


def test_rates_from_shards_and_missing_sets(tmp_path):
    sources = {
        "four": SourceConfig(write(tmp_path / "four", 4), group="g"),
        "one": SourceConfig(write(tmp_path / "one", 1), group="g"),
        "gone": SourceConfig(str(tmp_path / "gone"), group="g"),
        "lost": SourceConfig(str(tmp_path / "lost"), group="h"),
        "plain": SourceConfig(write(tmp_path / "plain", 2), rate=0.5),
    }
    groups = {"g": 1.5, "h": 3.0}
    with pytest.raises(DataError, match=r"2 of 5 data sets have no shards: gone .*lost .*data.missing=skip"):
        normalised_rates(sources, groups)
    rates = normalised_rates(sources, groups, "skip")
    assert rates == pytest.approx({"four": 0.5, "one": 0.25, "plain": 0.25})
    assert list(rates) == sorted(rates)
    switched_off = {**sources, "gone": SourceConfig(rate=0, group="g"), "lost": SourceConfig(rate=0, group="h")}
    assert normalised_rates(switched_off, groups) == pytest.approx(rates)
    table = {row.name: row for row in mixture_table(sources, groups, "skip")}
    assert {n: r.share for n, r in table.items()} == pytest.approx({**rates, "gone": 0.0, "lost": 0.0})
    assert table["four"].records == 4 and table["gone"].missing and is_missing(sources["gone"])
    complete = {row.name: row.share for row in mixture_table(sources, groups)}
    assert (
        complete["four"] is None and complete["lost"] == pytest.approx(0.6) and complete["plain"] == pytest.approx(0.1)
    )
    data = DataConfig(sources=sources, groups=groups, missing="skip")
    assert ExampleReader(data, None, 0).rates == rates  # what training draws from


def test_a_damaged_data_set_is_not_missing(tmp_path):
    write(tmp_path / "set", 2)
    (tmp_path / "set" / "manifest.parquet").write_text("{")
    with pytest.raises(DataError, match="cannot be parsed"):
        normalised_rates({"set": SourceConfig(str(tmp_path / "set"), group="g")}, {"g": 1.0}, "skip")


@pytest.mark.parametrize(
    ("source", "groups", "message"),
    [
        (SourceConfig(group="nope"), {"g": 1.0}, "no such group"),
        (SourceConfig(group="g"), {"g": -1.0}, r"data.groups.g must be"),
        (SourceConfig(group="g", size_factor=-2.0), {"g": 1.0}, "size_factor must be"),
        (SourceConfig(group="g", rate=float("inf")), {"g": 1.0}, "rate must be"),
    ],
)
def test_mistakes(source, groups, message):
    with pytest.raises(DataError, match=message):
        weights({"x": source}, groups, lambda *_: 1)


@pytest.mark.parametrize("overrides", [["recipe=8b", "stage=sft"], ["recipe=o7b", "stage=pretrain"], ["recipe=tiny"]])
def test_the_table_fits_eighty_columns(overrides, tmp_path):
    console = Console(width=80, record=True, file=open(tmp_path / "out", "w"))
    data = compose([*overrides]).data
    for part in render(data):
        console.print(part)
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(name in text for name in data.sources) and "…" not in text
    if "stage=sft" in overrides:
        assert "13.636%" in text and "5.455%" in text and "118 of 118 data sets have no shards" in text


def test_where_shards_are_looked_for(monkeypatch):
    monkeypatch.setenv("MOLMO2_DATA", "/nowhere")
    *_, note = render(compose(["recipe=8b", "stage=sft"]).data)
    assert str(note).endswith(". They are looked for in data.root=/nowhere, which MOLMO2_DATA names")
