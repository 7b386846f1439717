"""README.md of an exported folder: a run's own files, and what they do not say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from molmo2_nemo.convert import export_checkpoint, import_checkpoint
from molmo2_nemo.convert.model_card import model_card, stages_of
from molmo2_nemo.data.config import LengthConfig
from molmo2_nemo.model.config import preset
from molmo2_nemo.rundir.config_file import read_config
from molmo2_nemo.settings.schema import to_yaml
from tests.convert.test_checkpoints import make_source

torch.set_num_threads(1)
OLD = Path(__file__).parents[1] / "rundir" / "old_run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two stages, the later from the earlier one's checkpoint, in a folder that was moved since."""
    run = tmp_path / "moved"
    shutil.copytree(OLD / "sft", run / "sft")
    shutil.copytree(OLD / "sft", run / "long")
    cfg = read_config(run / "long" / "config.yaml")
    assert cfg is not None
    cfg.stage.name, cfg.init_from = "long", "/gone/before/sft/checkpoints/step=60"
    cfg.data.packing.sequence_length = 4096
    cfg.data.lengths = [LengthConfig(512, 0.0), LengthConfig(1024), LengthConfig(4096)]
    (run / "long" / "config.yaml").write_text(to_yaml(cfg))
    return run


def begin_from(run: Path, base: str | None) -> None:
    cfg = read_config(run / "sft" / "config.yaml")
    assert cfg is not None
    cfg.init_from = base
    (run / "sft" / "config.yaml").write_text(to_yaml(cfg))


def card(checkpoint: Path) -> str:
    return model_card(checkpoint, preset("tiny"), "native", "float32")


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of the table under a title."""
    part = text.split(f"## {title}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]


def test_stages_data_and_settings(run: Path) -> None:
    checkpoint = run / "long" / "checkpoints" / "step=60"
    assert [stage.name for stage in stages_of(checkpoint)] == ["sft", "long"]
    text = card(checkpoint)
    assert "# Molmo2 tiny, after stage long" in text
    summary = json.loads((run / "sft" / "summary.json").read_text())
    training = rows(text, "Training")
    assert [row[0] for row in training] == ["stage", "---", "sft", "long"]
    assert training[2][1] == "60" and training[2][3:5] == [summary["layout"], f"{summary['tokens']:,}"]
    assert training[2][2] == "4 x 768" and training[3][2] == "16 x 1,024 or 4 x 4,096"
    assert training[2][5] == f"{summary['first_loss']:.4g}"
    assert all(row[2:] == ["unknown"] * 4 for row in rows(text, "Data")[2:])  # the old run did not write them down
    assert "No scores lie in the run's folder" in text
    unknown = text.split("## Not known\n")[1]
    assert "- of stage long: command, commit," in unknown and "- licence, intended use" in unknown
    assert text == card(checkpoint)


def test_the_earlier_stage_alone(run: Path) -> None:
    text = card(run / "sft" / "checkpoints" / "step=60")
    assert "after stage sft" in text and [row[0] for row in rows(text, "Training")] == ["stage", "---", "sft"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"origin.json": {"llm": "/models/Qwen3-8B", "vit": "/models/siglip2"}, "molmo2.json": {}},
            "Qwen3-8B and siglip2",
        ),
        ({"molmo2.json": {"name": "8b"}}, "an imported Molmo2 (start)"),
    ],
)
def test_base_models(run: Path, files: dict[str, dict[str, str]], said: str) -> None:
    start = run.parent / "start"
    start.mkdir()
    for name, content in files.items():
        (start / name).write_text(json.dumps(content))
    begin_from(run, str(start))
    assert f"- base model: {said}\n" in card(run / "long" / "checkpoints" / "step=60")


def test_base_models_that_are_not_known(run: Path) -> None:
    checkpoint = run / "long" / "checkpoints" / "step=60"
    begin_from(run, None)
    assert "- base model: unknown\n" in card(checkpoint) and "may have been drawn at random" in card(checkpoint)
    begin_from(run, "/gone/qwen-start")
    assert "- base model: unknown\n" in card(checkpoint)
    assert "training began from /gone/qwen-start, and it is not there any more" in card(checkpoint)
    (run / "start").mkdir()
    begin_from(run, str(run / "start"))
    assert f"training began from {run / 'start'}, and it names no base model" in card(checkpoint)


def test_scores(run: Path) -> None:
    folder = run / "long" / "evaluation" / "step=60"
    folder.mkdir(parents=True)
    result = {"task": "count", "group": "point", "settings": {}, "questions": 1200, "failed": 3, "unscored": 0}
    (folder / "count.json").write_text(json.dumps({**result, "scores": {"counting": {"score": 0.5}}}))
    found = rows(card(run / "long" / "checkpoints" / "step=60"), "Scores")
    assert found[2:] == [["long", "step=60", "count", "counting", "0.5", "1,200", "3"]]
    several = {"counting": {"score": 0.5, "answers": 1190}, "exact_match": {"score": 1, "answers": 10}}
    result |= {"score": 0.504, "mixed": True, "scores": several, "settings": {"limit": 1000}}
    (folder / "count.json").write_text(json.dumps(result))
    found = rows(card(run / "long" / "checkpoints" / "step=60"), "Scores")
    first = ["long", "step=60", "count, at most 1,000 items"]
    figures = [["counting", "0.5", "1,190"], ["exact_match", "1", "10"], ["all questions", "0.504", "1,200"]]
    assert found[2:] == [[*first, *figure, "3"] for figure in figures]


def test_a_damaged_run_does_not_keep_weights_from_being_exported(run: Path) -> None:
    (run / "sft" / "summary.json").write_text("{")
    text = card(run / "long" / "checkpoints" / "step=60")
    assert "- stages, data, settings and scores: " in text and "summary.json is damaged" in text


def test_an_export_without_a_run_says_so(tmp_path: Path) -> None:
    make_source(tmp_path / "hf", preset("tiny"), "native", torch.float32)
    checkpoint = import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    text = (export_checkpoint(checkpoint, tmp_path / "out", dtype=torch.bfloat16) / "README.md").read_text()
    assert "- base model: an imported Molmo2 (megatron)\n" in text and "weights: bfloat16, in the native format" in text
    assert "- stages, data, settings and scores: megatron lies in no run's folder (no config.yaml above it)" in text
    assert "## Training" not in text
