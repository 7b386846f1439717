"""`molmo2 prepare --needs`: the catalogue covers every published data set, and its table, CSV and JSON say the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from data_prep.bringing import page
from data_prep.bringing.catalogue import NEEDED, load
from data_prep.bringing.needs import is_there, needs_of
from data_prep.sources import all_sources, find_source
from data_prep.sources.base import Hub
from molmo2_nemo.cli.main import main
from molmo2_nemo.errors import UserError

DOCS = Path(__file__).parents[3] / "docs"


def shown(capsys, *words: str) -> list[str]:
    assert main(["prepare", *words]) == 0
    return capsys.readouterr().out.splitlines()


def failure(capsys, *words: str) -> str:
    assert main(["prepare", *words]) == 2
    return capsys.readouterr().err


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_every_data_set_is_there_and_every_item_is_needed():
    catalogue = load()
    assert set(catalogue.sets) == set(all_sources())
    assert {name for items in catalogue.sets.values() for name in items} == set(catalogue.items)


def test_items_say_where_from_where_to_and_under_which_licence():
    for item in load().items.values():
        assert item.what and item.licence and item.into and item.found_in, item.name
        assert all(url.startswith("https://") for url in item.urls), item.name
        assert all(path == item.into or path.startswith(item.into.partition("{")[0].rstrip(".")) for path in item.there)
        assert item.there or item.ids or "{" in item.into, f"{item.name}: nothing says whether it is there"


@pytest.mark.parametrize("name", sorted(all_sources()))
def test_what_a_source_asks_for_below_source_is_in_the_catalogue(name):
    """A source that names media, or tables without an address, needs items; one that does not, needs none."""
    origin = all_sources()[name].origin
    by_url = name == "pixmo_multi_points"  # its images can be fetched one by one
    asks = bool(origin.media) if isinstance(origin, Hub) else True
    assert bool(load().sets[name]) == (asks and not by_url)


def test_targets_lie_in_folders_that_the_source_names():
    """The first folder of every target stands in what the source says about its media, or is its own."""
    for name, source in all_sources().items():
        origin = source.origin
        said = origin.media if isinstance(origin, Hub) else " ".join((origin.fetch, *origin.media))
        for item in load().of([name]):
            first = next(iter(item.there), item.into).split("/")[0]
            assert first == name or first in said or first.startswith("{"), (name, item.name, first)


def test_a_users_catalogue_replaces_fields(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("items:\n  coco_val2014: {urls: 'https://mirror.example/x.zip'}\nsets:\n  okvqa: [coco_val2014]\n")
    catalogue = load(path)
    assert catalogue.items["coco_val2014"].urls == ("https://mirror.example/x.zip",)
    assert catalogue.items["coco_val2014"].what == load().items["coco_val2014"].what
    assert catalogue.sets["okvqa"] == ("coco_val2014",) and len(load().sets["okvqa"]) == 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("items: [", "--catalogue .*line"),
        ("nothing: 1", "expected `items:` and `sets:`"),
        ("items: {coco_val2014: {url: x}}", "items.coco_val2014: unknown field 'url'; did you mean 'urls'"),
        ("items: {new: {how: magic}}", "`how` is 'magic'; expected one of fetch, hub"),
        ("items: {new: {how: fetch, what: x, licence: y, into: z}}", "urls missing, which how: fetch needs"),
        ("items: {coco_val2014: {into: ../..}}", "'../..' leads outside --source"),
        ("items: {coco_val2014: {there: /etc}}", "'/etc' leads outside --source"),
        ("sets: {okvqa: [coco_val214]}", "sets.okvqa: no item 'coco_val214'; did you mean 'coco_val2014'"),
        ("sets: {okvqa: coco_val2014}", "every entry of `sets:` is a list"),
        ("items: {coco_val2014: {sha1: 0000}}", "coco_val2014, sha1: expected a text, in quotes if need be, not 0"),
        ("items: {coco_val2014: 3}", "expected `items:`"),
    ],
)
def test_a_wrong_catalogue_is_refused(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load(path)


def test_a_catalogue_that_is_not_there(tmp_path, capsys):
    assert "No such file" in failure(capsys, "--needs", "okvqa", "--catalogue", str(tmp_path / "none.yaml"))


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_of_all_fits_80_columns_and_names_every_data_set(capsys, tmp_path):
    lines = shown(capsys, "--needs", "all", "--source", str(tmp_path))
    assert max(map(len, lines)) <= 80
    assert set(all_sources()) <= {line.split(" ")[0] for line in lines if line}
    assert any("Nobody can have all of today: molmo2_captions" in line for line in lines)


def test_a_few_show_addresses_targets_and_forms(capsys):
    text = "\n".join(shown(capsys, "--needs", "okvqa", "doc_qa"))
    assert text.count("https://s3.amazonaws.com/images.cocodataset.org/zips/train2014.zip") == 1
    assert "to       images/coco/train2014" in text and "form     registration" in text
    assert "fetched: 2 things for 1 data set, 19 GB where published (2 of 2)" in text


def test_what_is_there_is_seen(capsys, tmp_path):
    (tmp_path / "images/coco/train2014").mkdir(parents=True)
    lines = shown(capsys, "--needs", "okvqa", "--source", str(tmp_path))
    assert lines[1].endswith("no"), "an empty folder is not the images"
    (tmp_path / "images/coco/train2014/x.jpg").write_bytes(b"x")
    lines = shown(capsys, "--needs", "okvqa", "--source", str(tmp_path))
    ends = [line.split()[-1] for line in lines if line.startswith(("okvqa", " ")) and "fetched" in line]
    assert ends == ["yes", "no"]
    assert is_there(load().items["coco_train2014"], tmp_path)


def test_groups_recipes_and_published_names(capsys):
    tracking = {name for name, source in all_sources().items() if "tracking" in source.mixes.values()}
    for words, names in (
        (["tracking"], tracking),
        (["vixmo_points_minmax_0_5"], {"molmo2_video_point_minmax_0_5"}),
        (["recipe=4b"], {name for name, source in all_sources().items() if source.mixes}),
    ):
        lines = shown(capsys, "--needs", *words)
        assert names <= {line.split(" ")[0] for line in lines if line}, words


def test_csv_and_json_hold_the_same(capsys, tmp_path):
    for end in ("csv", "json"):
        shown(capsys, "--needs", "all", "--needs-out", str(tmp_path / f"needs.{end}"))
    from_json = json.loads((tmp_path / "needs.json").read_text())
    with (tmp_path / "needs.csv").open(newline="") as file:
        from_csv = list(csv.DictReader(file))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in from_json] == from_csv
    assert {row["data_set"] for row in from_json} == set(all_sources())
    coco = next(row for row in from_json if row["item"] == "coco_train2017")
    assert coco["address"].endswith("train2017.zip") and coco["target"] == "images/coco/train2017"
    assert coco["gb"] == 18 and coco["count"] == 118287 and coco["rows"] == "hf://datasets/allenai/molmo2-a-ok-vqa"
    assert {row["how"] for row in from_json} == {*NEEDED, "prepare"}


@pytest.mark.parametrize(
    "words, seen",
    [
        (["--needs"], "name data sets, a group such as tracking"),
        (["--needs", "trakcing"], "no data set or group 'trakcing'; did you mean 'tracking'"),
        (["--needs", "qqq"], "groups: .*image_academic.*--list shows all"),
        (["--needs", "own.jsonl"], "about published data sets"),
        (["--needs", "recipe=tiny"], "recipe=tiny trains on demo"),
        (["--needs", "okvqa", "--needs-out", "x.txt"], "ends in .csv or .json"),
        (["--needs", "okvqa", "--needs-out", "/nowhere/x.csv"], "no folder /nowhere"),
        (["--needs", "okvqa", "--source", "/nowhere"], "--source /nowhere: no such folder"),
        (["--needs", "--list", "okvqa"], "different commands"),
        (["--fetch", "okvqa"], "--fetch needs one --source ROOT"),
        (["--fetch", "okvqa", "--source", "x", "--out", "y"], "--out belongs to preparing"),
        (["--fetch", "--needs", "okvqa"], "--needs shows, --fetch brings"),
        (["--fetch", "okvqa", "--source", __file__], "is a file; name a folder"),
        (["--fetch", "okvqa", "--source", "/proc/none"], "--source /proc/none cannot be made"),
        (["--fetch", "okvqa", "--source", "x", "--per-host", "0"], "--per-host 0: must be at least 1"),
        (["okvqa", "--out", "x", "--keep-archives"], "--keep-archives belongs to"),
        (["okvqa", "--out", "x", "--needs-out", "x.csv"], "--needs-out belongs to --needs"),
    ],
)
def test_wrong_calls(capsys, words, seen):
    import re

    assert re.search(seen, failure(capsys, *words))


def test_the_page_is_that_of_the_catalogue():
    """Made by python -m data_prep.bringing.page."""
    assert (DOCS / "data_sets.md").read_text() == page.made()


def test_what_can_be_had_today():
    def of(name):
        return page.today(needs_of([find_source(name)], load()))

    assert of("okvqa") == "yes, fetched" and of("tulu4") == "yes, `prepare` alone"
    assert "hosted nowhere" in of("molmo2_captions") and of("doc_qa") == "by hand"
    assert of("molmo2_video_track") == "partly fetched, the rest by hand"
    assert of("vicas_track") == "yes, fetched" and of("how2qa") == "what YouTube still has"
    assert of("molmo2_human_qa") == "yes, you pay the transfer"
