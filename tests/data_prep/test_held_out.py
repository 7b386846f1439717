"""Held-out data: sides that follow what is shown, and the validation splits of published sets."""

import json
import random
import shlex
from pathlib import Path

import pytest
from PIL import Image

from data_prep import demo
from data_prep.held_out import HeldOut, marks, validation_source
from data_prep.other_settings import change
from data_prep.sources import all_sources
from data_prep.sources.base import Context, Cut, File, Hub, Inline, Sample, Skip
from data_prep.sources.common import hold_out
from data_prep.sources.validation import names
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.manifest import MANIFEST, read_entries, read_head
from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.compose import compose
from tests.support.packs import demo_packs, train_on_packs


@pytest.fixture
def own(tmp_path, monkeypatch):
    """200 pictures with two questions each, ten texts, and ten records that show two pictures."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for n in range(200):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(f"{n}.png")
        lines += [{"key": f"{n}-{i}", "image": f"{n}.png", "question": f"q{i}", "answer": "a"} for i in range(2)]
    lines += [{"key": f"text-{n}", "messages": [f"q{n}", "a"]} for n in range(10)]
    lines += [{"key": f"two-{n}", "images": [f"{n}.png", f"{n + 100}.png"], "caption": "c"} for n in range(10)]
    write(lines)
    return lines


def write(lines):
    with open("own.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def prepared(*words):
    assert main(["prepare", "own.jsonl", "--out", "o", "--workers", "0", "--hold-out", "10%", *words]) == 0
    return keys("own"), keys("own-validation")


def keys(name, out="o"):
    return {entry.key for shard in read_entries(Path(out) / name / MANIFEST) for entry in shard}


def pictures(lines, chosen):
    return {p for line in lines if line["key"] in chosen for p in [line.get("image"), *line.get("images", ())] if p}


def test_no_picture_is_on_both_sides(own, capsys):
    kept, held = prepared()
    assert not kept & held and not pictures(own, kept) & pictures(own, held)
    lost = {line["key"] for line in own} - kept - held
    assert lost == {
        line["key"]
        for line in own
        if len(line.get("images", ())) == 2 and len({f"{p[:-4]}-0" in held for p in line["images"]}) == 2
    }
    assert 25 < len(held) < 60, "a tenth of 200 pictures with two questions each, and of some texts"
    said = capsys.readouterr().out
    assert f"{len(lost):>10,}  shows media of both sides of --hold-out" in said
    assert read_head(Path("o/own-validation") / MANIFEST)["name"] == "own-validation"


def test_sides_stay_where_lines_are_added_and_sorted(own):
    kept, held = prepared()
    more = [{"key": f"more-{n}", "image": f"{n}.png", "question": "another", "answer": "a"} for n in range(50)]
    write([*own, *more])
    kept_too, held_too = prepared()
    assert kept < kept_too and held < held_too, "lines at the end are added to both"
    for line in more:
        assert (line["key"] in held_too) == (f"{line['key'][5:]}-0" in held)
    shuffled = [*own, *more]
    random.Random(1).shuffle(shuffled)
    write(shuffled)
    assert prepared("--overwrite") == (kept_too, held_too)


def test_nothing_held_out_is_said(own, capsys):
    write(own[:2])
    assert main(["prepare", "own.jsonl", "--out", "o", "--workers", "0", "--hold-out", "0.0001"]) == 0
    assert "own-validation: nothing is held out" in capsys.readouterr().out
    assert keys("own") == {"0-0", "0-1"}


def test_another_share_is_refused_in_words(own, capsys):
    prepared()
    call = ["prepare", "own.jsonl", "--out", "o", "--workers", "0"]
    for words, differs in (
        (["--hold-out", "2.5%"], "--hold-out: 10% there, 2.5% now"),
        ([], "--hold-out: 10% there, none now"),
        (["--hold-out", "10%", "--limit", "5"], "--limit: none there, 5 now"),
        (["--hold-out", "10%", "--repeat-media"], "--repeat-media: not given there, given now"),
        (["--hold-out", "10%", "--shard-mb", "20"], "--shard-mb: 1000 there, 20 now"),
        (["--hold-out", "10%", "--gop", "60"], "--gop: none there, 60 now"),
    ):
        assert main([*call, *words]) == 2
        assert f"with other settings ({differs})" in (error := capsys.readouterr().err) and "{" not in error


def test_the_words_of_published_sources_and_parts():
    before = {"repo": "a/b", "configs": [], "split": "train"}
    now = {**before, "configs": ["x", "y"], "split": "val"}
    assert change("origin", before, now) == "its configs: none there, x, y now, its split: train there, val now"
    assert change("split", None, "validation") == "--split: train there, validation now"
    assert change("seed", 0, 5, ("in part 1", "in part 3")) == "--seed: 0 in part 1, 5 in part 3"
    held = [{"share": 0.1, "held": held} for held in (False, True)]
    assert change("held_out", *held) == "--hold-out: 10% there, 10% (what is held out) now"


def test_parts_of_both_sides_are_the_whole(own):
    sides = prepared()
    call = ["prepare", "own.jsonl", "--out", "p", "--workers", "0", "--hold-out", "10%"]
    for number in (1, 2):
        assert main([*call, "--part", f"{number}/2"]) == 0
    for name, side in zip(("own", "own-validation"), sides, strict=True):
        assert main(["shards", "join", f"p/{name}"]) == 0
        assert keys(name, "p") == side


@pytest.mark.parametrize("text", ["0", "0%", "60%", "-1", "x", "", "nan"])
def test_wrong_shares(text):
    with pytest.raises(UserError, match="--hold-out .*above 0 and at most 50%"):
        HeldOut.parse(text)


def test_what_a_sample_shows():
    film = File("a/film.mp4")
    assert marks(Sample("k", video=Cut(film, 1.0, 2.0))) == marks(Sample("other", video=film)), "clips of one film"
    assert marks(Sample("k", images=[Inline(b"x", "png")])) != marks(Sample("k", images=[Inline(b"y", "png")]))
    text = [{"style": "user_qa", "question": "q", "answer": "a"}]
    assert marks(Sample("k", text)) == marks(Sample("other", text)) != marks(Sample("k", [{**text[0], "answer": "b"}]))


def test_the_walk_of_the_page(workers, tmp_path, monkeypatch):
    """Its commands, with the page's first example as trip.jsonl: the held-out records get a loss."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    example = page.split("cat > own.jsonl <<'END'\n")[1].split("END\n")[0]
    (tmp_path / "trip.jsonl").write_text(example)
    walk = page.split("### Held-out data")[1].split("\n### ")[0].replace("\\\n", " ")
    call, train, *_ = (shlex.split(line)[1:] for line in walk.splitlines() if line.startswith("molmo2 "))
    assert main([*call, "--workers", "0", "--source", str(demo.MEDIA)]) == 0
    cfg = compose(train[1:])
    cfg.output_dir = str(tmp_path / "runs")
    for source in (*cfg.data.sources.values(), *cfg.validation.sources.values()):
        source.path = str(tmp_path / source.path)  # the processes that train have another working folder
    workers.run(train_on_packs, cfg, demo_packs(8), fit=True)
    lines = [json.loads(line) for line in (tmp_path / "runs" / "sft" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and all(line["losses"]["trip"] > 0 for line in lines)
    assert lines[0]["counts"]["trip"]["examples"]["count"] == len(keys("trip-validation", "shards"))


# --- published -------------------------------------------------------------------------------------------------------


def test_what_training_leaves_out_is_validation():
    entries = [(f"k{n}", n) for n in range(500)]
    kept = [e for e in hold_out(entries, Context.for_tests(), "x", 20) if not isinstance(e, Skip)]
    held = list(hold_out(entries, Context.for_tests(validation=True), "x", 20))
    assert len(held) == 20 and sorted([*kept, *held]) == sorted(entries)


def test_every_name_is_a_data_set_and_reads_something_else():
    for name in names():
        source = all_sources()[name]
        changed = validation_source(source)
        assert changed.records is source.records
        if isinstance(source.origin, Hub):
            assert changed.origin.repo == source.origin.repo
    with pytest.raises(UserError, match="tulu4 has no validation split here; these have one: a_okvqa_da"):
        validation_source(all_sources()["tulu4"])


def test_a_published_set_from_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"question": "q", "answers": ["a"], "image": "documents/1.png", "questionId": 1, "data_split": "val"}
    (tmp_path / "raw" / "documents").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "raw" / "documents" / "1.png")
    (tmp_path / "raw" / "val_v1.0_withQT.json").write_text(json.dumps({"data": [row]}))
    call = ["prepare", "doc_qa", "--source", "raw", "--out", "o", "--workers", "0"]
    (tmp_path / "raw" / "val_v1.0_withQT.json").rename(tmp_path / "away")
    assert main([*call, "--split", "validation"]) == 2
    assert "of the validation split, val_v1.0_withQT.json" in capsys.readouterr().err
    (tmp_path / "away").rename(tmp_path / "raw" / "val_v1.0_withQT.json")
    assert main([*call, "--split", "validation"]) == 0
    assert keys("doc_qa-validation") == {"1"} and not (tmp_path / "o" / "doc_qa").exists()
    assert main(call) == 2 and "train_v1.0_withQT.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["own.jsonl", "--split", "validation"], "hold a share out: --hold-out 2%"),
        (["doc_qa", "--hold-out", "2%"], "of doc_qa take its own: --split validation"),
        (["tulu4", "--split", "validation"], "tulu4 has no validation split here"),
    ],
)
def test_wrong_calls(own, capsys, words, seen):
    assert main(["prepare", *words, "--out", "o", "--workers", "0"]) == 2
    assert seen in capsys.readouterr().err
