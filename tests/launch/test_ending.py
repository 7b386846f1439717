"""What a run says when it starts and when it has ended: where it is, what came of it, what can be done with it."""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys

from molmo2_nemo.cli.main import build_parser
from molmo2_nemo.launch.local import starting
from molmo2_nemo.launch.reports import next_commands, show_finished, show_next
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.lines import append_line
from molmo2_nemo.rundir.paths import METRICS, stage_dir
from molmo2_nemo.rundir.summary import resolve_checkpoint, write_summary
from molmo2_nemo.settings.compose import compose


def finished(tmp_path, *words):
    """A run in a folder whose name the shell would part in two, with three steps of 25 s."""
    folder = tmp_path / "my runs"
    cfg = compose(["recipe=tiny", "stage=sft", "stage.max_steps=3", f"output_dir='{folder}'", *words])
    write_config(cfg)
    for step in range(1, 4):
        append_line(stage_dir(cfg) / METRICS, {"step": step, "seconds": 25.0})
    checkpoint = stage_dir(cfg) / "checkpoints" / "step=3"
    (checkpoint / "weights").mkdir(parents=True)
    write_summary(stage_dir(cfg), {"steps": 3, "tokens": 61067, "checkpoint": str(checkpoint)})
    return cfg


def test_what_came_of_it(tmp_path, capsys):
    show_finished(finished(tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        "sft: finished, 3 steps, 61,067 tokens, 1 min of training",
        f"checkpoint: {tmp_path}/my runs/sft/checkpoints/step=3",
    ]


def test_the_next_commands_are_right(tmp_path, capsys, monkeypatch):
    """They are parsed as the shell and the command would, and name what is there."""
    cfg = finished(tmp_path, "data.sources.demo.path=shards/mine")
    show_next(cfg)
    head, *shown = capsys.readouterr().out.splitlines()
    assert head == "next:" and [line.strip() for line in shown] == next_commands(cfg)
    calls = [shlex.split(line) for line in shown]
    assert [call[:2] for call in calls] == [["molmo2", verb] for verb in ("ask", "evaluate", "report", "convert")]
    parsed = [build_parser().parse_args(call[1:]) for call in calls]
    checkpoint = stage_dir(cfg) / "checkpoints" / "step=3"
    for place in (parsed[0].checkpoint, parsed[1].overrides[0], parsed[3].source):
        assert resolve_checkpoint(place) == checkpoint
    assert parsed[2].folder == cfg.output_dir and parsed[1].data == "shards/mine"
    assert not parsed[3].target.exists() and parsed[3].target.parent == tmp_path
    monkeypatch.setenv("RANK", "1")
    show_next(cfg)
    assert capsys.readouterr().out == ""


def test_held_out_data_are_scored_first(tmp_path):
    cfg = finished(tmp_path, "validation.sources.held.path=shards/held")
    assert any(line.endswith("--data shards/held") for line in next_commands(cfg))


def test_what_it_is_about_to_do(tmp_path):
    cfg = compose(["recipe=tiny", "stage=sft", "parallel=tp2", f"output_dir={tmp_path}", "stage.max_steps=1200"])
    assert starting(cfg, 2).splitlines() == [
        f"sft: 1,200 steps of the tiny model on TP2, in {tmp_path}/sft",
        "sft: 2 processes start: libraries first (10 to 60 s), then the model and the data",
    ]


def test_a_finished_run_answers_in_under_three_seconds_of_processor_time(tmp_path, shards):
    """The same command again: it says so, starts no process and loads no library that takes seconds."""
    words = ["recipe=tiny", "stage=sft", "parallel=single", "stage.max_steps=3", f"output_dir={tmp_path}/run"]
    words.append(f"data.sources.demo.path={shards}/sft")
    cfg = compose(words)
    write_config(cfg)
    append_line(stage_dir(cfg) / METRICS, {"step": 3, "seconds": 25.0})
    checkpoint = stage_dir(cfg) / "checkpoints" / "step=3"
    (checkpoint / "weights").mkdir(parents=True)
    (checkpoint / "weights" / "a.distcp").write_bytes(b"numbers")
    checkpoint_manifest.write(checkpoint, checkpoint_manifest.describe(checkpoint, [checkpoint / "weights/a.distcp"]))
    write_summary(stage_dir(cfg), {"steps": 3, "tokens": 100, "checkpoint": str(checkpoint)})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "molmo2_nemo.cli.main", "train", *words], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[:2] == [f"sft: already finished, 3 steps ({checkpoint})", "next:"]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
