"""A stage's folder as an earlier version wrote it (old_run/: the demo's second stage, most lines and files left out) is
read, shown, resumed and exported, and what has another name by now is answered."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from molmo2_nemo.cli import main as command
from molmo2_nemo.convert.checkpoints import run_settings
from molmo2_nemo.convert.preprocessing import run_data
from molmo2_nemo.errors import UserError
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.config_file import read_config
from molmo2_nemo.rundir.lines import cut_lines, read_metrics
from molmo2_nemo.rundir.progress import read_run
from molmo2_nemo.rundir.resume import FREE, changed_settings, refuse_changes, refuse_other_run
from molmo2_nemo.rundir.summary import read_summary, resolve_checkpoint
from molmo2_nemo.settings import renamed
from molmo2_nemo.settings.run import RunConfig

OLD = Path(__file__).parent / "old_run"
RENAMED = "parallel.context_exchange is now called parallel.cp_comm_type, and read as that"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of it, with the files that the checkpoint's manifest lists in their sizes."""
    monkeypatch.setattr(renamed, "_answered", set())
    shutil.copytree(OLD, tmp_path / "run")
    checkpoint = tmp_path / "run" / "sft" / "checkpoints" / "step=60"
    listed = checkpoint_manifest.read(checkpoint)
    assert listed is not None and len(listed) == 2
    for name, (size, _) in listed.items():
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(bytes(size))
    return tmp_path / "run"


def test_its_settings(run, capsys):
    cfg = read_config(run / "sft" / "config.yaml")
    assert isinstance(cfg, RunConfig) and (cfg.parallel.tensor, cfg.parallel.sequence) == (2, True)
    assert cfg.parallel.cp_comm_type == "ring" and cfg.data.packing.sequence_length == 768
    assert capsys.readouterr().err == f"{run}/sft/config.yaml: {RENAMED}\n"


def test_its_metrics(run):
    lines = read_metrics(run / "sft", tokens=int, padded_tokens=int)
    assert [line["step"] for line in lines] == [1, 2, 3, 58, 59, 60]
    assert (lines[0]["tokens"], lines[0]["padded_tokens"]) == (3060, 3072) and "slots" not in lines[0]
    cut_lines(run / "sft" / "metrics.jsonl", 3)
    written = [json.loads(line) for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert written == lines[:3]


def test_its_end(run):
    summary = read_summary(run / "sft")
    assert summary is not None
    assert (summary["layout"], summary["steps"], summary["last_loss"]) == ("TP2+SP", 60, 0.23143526911735535)
    assert resolve_checkpoint(run) == run / "sft" / "checkpoints" / "step=60"
    assert read_summary(run / "sft", max_steps=61) is None
    (stage,) = read_run(run)
    assert (stage.state, stage.step, stage.checkpoint) == ("finished", 60, Path(summary["checkpoint"]))
    (run / "sft" / "summary.json").unlink()
    (stage,) = read_run(run, time.time() + 3600)  # an hour after the copy
    assert stage.state == "stopped" and stage.attempt["host"] == "node1"


def test_status_and_report(run, tmp_path, capsys):
    assert command.main(["status", str(run)]) == 0
    shown = capsys.readouterr()
    assert [line.split()[:4] for line in shown.out.splitlines()][1] == ["sft", "finished", "60/60", "0.2314"]
    assert f"sft: last checkpoint {run}/sft/checkpoints/step=60" in shown.out
    assert shown.err == f"{run}/sft/config.yaml: {RENAMED}\n"
    page = tmp_path / "page.html"
    assert command.main(["report", str(run), "--out", str(page)]) == 0
    assert "cp_comm_type" in page.read_text() and "context_exchange" not in page.read_text()


def test_it_resumes_with_its_settings_under_either_name(run, capsys):
    """The same settings are no change; another way to send keys may be chosen when a run resumes, not while it runs."""
    cfg = read_config(run / "sft" / "config.yaml")
    assert cfg is not None
    cfg.output_dir = str(run)
    refuse_changes(cfg, run / "sft", "a checkpoint")
    refuse_changes(cfg, run / "sft", "a checkpoint", finished=True)
    cfg.parallel.cp_comm_type = "all_gather"
    refuse_changes(cfg, run / "sft", "a checkpoint")
    assert changed_settings(cfg, run / "sft" / "config.yaml", FREE) == [
        "parallel.cp_comm_type was 'ring', is now 'all_gather'"
    ]
    cfg.init_from = None
    refuse_other_run(cfg)
    assert f"sft resumes from {run}/sft/checkpoints/step=60" in capsys.readouterr().out
    cfg.data.packing.sequence_length = 512
    with pytest.raises(UserError, match="data.packing.sequence_length was 768, is now 512. Use the old settings"):
        refuse_other_run(cfg)


def test_export_and_answers_find_its_settings(run):
    settings = run_settings(run / "sft" / "checkpoints" / "step=60")
    assert settings["parallel"]["cp_comm_type"] == "ring" and "context_exchange" not in settings["parallel"]
    data = run_data(settings)
    assert data is not None and (data.image.crop_size, data.video.max_frames) == (126, 8)
