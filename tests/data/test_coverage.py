"""How much of a data set is there, and what is said of it."""

import json
import math

import pytest
from PIL import Image

from molmo2_nemo.cli import mixture
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import DataConfig, PackingConfig, SourceConfig
from molmo2_nemo.data.coverage import PUBLISHED, Coverage, coverage, examples_per_pack, percent, standing_in
from molmo2_nemo.data.loader import PackStream


def head(records, skipped=None, **more):
    return {"records": records, "skipped": skipped or {}, "kind": "published", **more}


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("doc_qa", head(24_072), "61 % of 39,463 (arXiv 2007.00398, questions)"),
        ("doc_qa", head(39_463), "100 % of 39,463 (arXiv 2007.00398, questions)"),
        ("doc_qa", head(39_462), "99 % of 39,463 (arXiv 2007.00398, questions)"),
        ("doc_qa", head(3), "<1 % of 39,463 (arXiv 2007.00398, questions)"),
        ("doc_qa", head(40_000, {"media not found": 10_000}), "80 % of 50,000 (the rest had no media)"),
        ("doc_qa", head(3, kind="own data"), ""),
        (
            "mine",
            head(61, {"media not found": 30, "download failed": 9, "bad line": 5}),
            "61 % of 100 (the rest had no media)",
        ),
        ("mine", head(61, {"bad line": 5}), ""),
        ("mine", head(61, {"media not found": 30}, settings={"limit": 61}), "a part of it (--limit)"),
        ("mine", head(27, {"held out for validation": 3}, settings={"limit": 100}), ""),
        ("doc_qa", head(4, settings={"split": "validation"}), ""),
    ],
)
def test_words(name, given, words):
    assert coverage(name, given).words() == words


def test_percent_is_not_rounded_to_nothing_or_all():
    assert [percent(share) for share in (0, 0.001, 0.01, 0.995, 0.9999, 1)] == [
        "0 %",
        "<1 %",
        "1 %",
        "99 %",
        "99 %",
        "100 %",
    ]


def test_few_that_stand_in_for_many():
    source = SourceConfig(group="demo", size_factor=100_000)
    assert (
        standing_in("x", Coverage(11, None), source) == "x: 11 records stand in for the 100,000 that the mixture counts"
    )
    assert standing_in("x", Coverage(11, None), SourceConfig(size_factor=100_000)) == "", "it has no group"
    assert standing_in("x", Coverage(10_000, None), source) == ""
    assert standing_in("x", Coverage(1, 11, "published")) == "x: 1 record stands in for 11 (published)"
    assert standing_in("x", Coverage(2, 11, "published")) == ""


def test_every_published_size_is_of_a_source():
    from data_prep.sources import all_sources

    assert set(PUBLISHED) <= set(all_sources()) and all(size.source for size in PUBLISHED.values())


def test_examples_of_a_pack():
    config = DataConfig(packing=PackingConfig(sequence_length=1000, max_crops=10))
    sizes = {"a": (100.0, 0.0), "b": (300.0, 4.0)}
    assert examples_per_pack(sizes, {"a": 0.5, "b": 0.5}, config) == 5, "200 tokens and 2 crops on average"
    assert examples_per_pack(sizes, {"a": 1.0}, config) == 10
    assert examples_per_pack(sizes, {"b": 0.2, "gone": 0.8}, config) == 2.5
    assert examples_per_pack({}, {"a": 1.0}, config) == 3.8
    assert examples_per_pack({"a": (5000.0, 0.0)}, {"a": 1.0}, config) == 1


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Eleven of DocVQA's questions, and two of their pictures."""
    monkeypatch.chdir(tmp_path)
    row = {"question": "q", "answers": ["a"], "data_split": "train"}
    rows = [{**row, "questionId": n, "image": f"documents/{min(n, 2)}.png"} for n in range(12)]
    (tmp_path / "raw" / "documents").mkdir(parents=True)
    for n in range(2):
        Image.new("RGB", (30, 30), (n, 0, 0)).save(tmp_path / "raw" / "documents" / f"{n}.png")
    (tmp_path / "raw" / "train_v1.0_withQT.json").write_text(json.dumps({"data": rows[:3]}))
    return tmp_path


def test_said_by_prepare_mixture_and_training(place, capsys):
    assert main(["prepare", "doc_qa", "--source", "raw", "--out", "s", "--workers", "0"]) == 0
    warning = "warning: doc_qa: 2 records stand in for 39,463 (arXiv 2007.00398, questions)"
    assert warning in capsys.readouterr().out
    words = ["recipe=8b", "stage=sft", "data.root=s", "data.missing=skip", "stage.max_steps=10"]
    assert main(["mixture", *words, "stage.global_batch_size=2", "data.packing.max_crops=20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert warning in lines and max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith("doc_qa ")]
    (note,) = [line for line in lines if line.startswith("epochs: 20 packs of about ")]
    each, epochs = float(note.split()[5]), float(row.split()[1])
    assert row.split()[2:] == ["<1", "%", "39,463"]
    assert math.isclose(epochs, 20 * each / 2, rel_tol=0.06)
    config = DataConfig(sources={"doc_qa": SourceConfig(path="s/doc_qa")})
    said = PackStream(config, micro_batch_size=1, dp_rank=0, dp_size=1).warnings()
    assert said == [f"{warning}; molmo2 mixture shows all"]


def test_the_warning_is_red(place, capsys):
    from rich.console import Console
    from rich.text import Text

    assert main(["prepare", "doc_qa", "--source", "raw", "--out", "s", "--workers", "0"]) == 0
    parts = mixture.render(DataConfig(sources={"doc_qa": SourceConfig(path="s/doc_qa")}), 10)
    (red,) = [part for part in parts if isinstance(part, Text) and "warning" in part.plain]
    assert "red" in str(red.style)
    with (console := Console(force_terminal=True)).capture() as shown:
        console.print(red)
    assert "\x1b[1;31m" in shown.get()
