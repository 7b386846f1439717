"""What a run's folder says to `molmo2 status` and `molmo2 report`, at every point of a run's life."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET

import pytest

from molmo2_nemo.cli import main as command
from molmo2_nemo.errors import USER_ERROR, UserError
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.attempt import heartbeat, this_process
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.lines import append_line as append
from molmo2_nemo.rundir.lines import cut_lines
from molmo2_nemo.rundir.progress import StageProgress, duration, read_run, read_stage
from molmo2_nemo.rundir.summary import resolve_checkpoint
from molmo2_nemo.settings.compose import compose

NOW = 1_000_000.0


def stage(folder, name, steps, *, last=NOW, every=10.0, bad=0, **more):
    """A stage of 100 steps whose last of `steps` ended at `last`; `bad` of them were skipped."""
    cfg = compose(["recipe=tiny", f"stage={name}", f"output_dir={folder}", "stage.max_steps=100"])
    write_config(cfg)
    place = folder / name
    for step in range(1, steps + 1):
        line = {
            "step": step, "time": last - (steps - step) * every, "loss": 8.0 / step, "seconds": 8.0, "tokens": 800,
            "tokens_per_second": 100.0, "fill": 0.96, "crop_fill": 0.5, "wait": 0.1, "skipped": 3, "mfu": 0.31,
            "tasks": {"demo": 8.0 / step, "text <1>": 4.0 / step}, "grad_norm_vit": 0.1, "grad_norm_connector": 0.2,
            "grad_norm_llm": 0.3, "lr_vit": 1e-5, "lr_connector": 1e-5, "lr_llm": 1e-5, "skipped_steps": bad,
        }  # fmt: skip
        append(place / "metrics.jsonl", line)
    begin(place, {"time": last - steps * every - 5, "host": "elsewhere", "pid": 1, "layout": "DP2", **more})
    return place


def begin(place, attempt):
    """What an attempt writes down; it has given no sign of life since."""
    (place / "attempt.json").write_text(json.dumps(attempt))
    os.utime(place / "attempt.json", (attempt["time"], attempt["time"]))


def checkpoint(place, step):
    folder = place / "checkpoints" / f"step={step}"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "a.distcp").write_bytes(b"x" * step)
    checkpoint_manifest.write(folder, checkpoint_manifest.describe(folder, checkpoint_manifest.share(folder, 0, 1)))
    return folder


def state(place, now=NOW + 5):
    return read_stage(place, now).state


def test_states(tmp_path):
    place = stage(tmp_path, "sft", 40)
    assert state(place) == "running"
    assert state(place, NOW + 3600) == "stopped"  # no sign of life
    append(place / "errors.jsonl", {"time": NOW - 300, "message": "an earlier attempt's"})
    assert state(place) == "running"
    append(place / "errors.jsonl", {"time": NOW + 2, "message": "the cause"})
    append(place / "errors.jsonl", {"time": NOW + 3, "message": "what followed from it"})
    found = read_stage(place, NOW + 5)
    assert found.state == "failed" and found.last_error["message"] == "the cause"
    attempt = {"time": NOW + 4, "host": "elsewhere", "pid": 1}
    begin(place, attempt)
    assert state(place) == "starting" and state(place, NOW + 3600) == "stopped"
    begin(place, {**attempt, "left": "SIGUSR1"})
    assert state(place) == "stopped"
    finish(place, 100)
    assert state(place) == "finished"


def finish(place, steps):
    (place / "summary.json").write_text(
        json.dumps({"steps": steps, "checkpoint": f"checkpoints/step={steps}"}, indent=1)
    )


def test_a_stage_that_is_to_have_more_steps_is_not_finished(tmp_path):
    """Its summary is that of the shorter one; errors of the attempt to go on are shown."""
    place = stage(tmp_path, "sft", 25)
    checkpoint(place, 20)
    finish(place, 20)
    assert state(place) == "running"
    append(place / "errors.jsonl", {"time": NOW + 1, "message": "no such shard"})
    found = read_stage(place, NOW + 5)
    assert (found.state, found.step, found.max_steps) == ("failed", 25, 100)
    with pytest.raises(UserError, match="is not finished"):
        resolve_checkpoint(place, finished=True)
    remarks: list[str] = []
    assert resolve_checkpoint(place, remarks) == place / "checkpoints" / "step=20"
    assert "is not finished; its last whole checkpoint is used" in remarks[0]


def test_the_cause_is_told_whenever_it_was_found_out(tmp_path):
    place = stage(tmp_path, "sft", 40)
    append(place / "errors.jsonl", {"time": NOW + 2, "message": "connection closed by peer"})
    append(place / "errors.jsonl", {"time": NOW + 4, "message": "process 1 was ended by SIGKILL", "cause": True})
    assert read_stage(place, NOW + 5).last_error["message"] == "process 1 was ended by SIGKILL"


def test_torn_and_foreign_lines_hide_nothing(tmp_path, capsys):
    """A process killed while it writes leaves half a line; the next line stands on its own."""
    place = stage(tmp_path, "sft", 40, bad=1)
    torn, foreign = (
        '{"time": 1.0, "mess',
        ["[1]", "null", "7", '{"time": "now"}', '{"message": "m"}', "\x00\x01", '"x"'],
    )
    for name in ("errors.jsonl", "faults.jsonl", "validation.jsonl", "metrics.jsonl"):
        before = (place / name).read_text() if (place / name).exists() else ""
        (place / name).write_text("\n".join([*foreign, before + torn]))
    for name, line in (
        ("errors.jsonl", {"time": NOW + 1, "message": "the next error"}),
        ("faults.jsonl", {"step": 7, "fault": "loss is not finite", "records": []}),
        ("validation.jsonl", {"step": 40, "losses": {"held": 1.25}}),
        ("metrics.jsonl", {**json.loads(json.dumps(read_stage(place, NOW).steps[-1])), "step": 41}),
    ):
        append(place / name, line)
    found = read_stage(place, NOW + 5)
    assert found.last_error["message"] == "the next error" and found.step == 41 and len(found.steps) == 41
    assert [len(part) for part in (found.errors, found.faults, found.validation)] == [1, 1, 1]
    cut_lines(place / "metrics.jsonl", 40)
    assert [line["step"] for line in lines_of(place)] == list(range(1, 41))
    assert command.main(["status", str(tmp_path)]) == 0
    assert "1 step skipped, the last at 7" in capsys.readouterr().out


def lines_of(place):
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_works_between_steps_is_running(tmp_path):
    """A long save or validation: on this machine its process is there, elsewhere it gives a sign of life."""
    here = stage(tmp_path / "a", "sft", 4, **{**this_process(), "time": NOW - 100})
    assert state(here, NOW + 7200) == "running"
    later = {**this_process(), "time": NOW - 100, "started": 1}  # another process had this id
    assert state(stage(tmp_path / "b", "sft", 4, **later), NOW + 5) == "stopped"
    there = stage(tmp_path / "c", "sft", 4)
    assert state(there, NOW + 7200) == "stopped"
    os.utime(there / "attempt.json", (NOW + 7190, NOW + 7190))
    assert state(there, NOW + 7200) == "running"


def test_the_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr("molmo2_nemo.rundir.attempt.BEAT", 0.01)
    path = tmp_path / "attempt.json"
    path.write_text("{}")
    os.utime(path, (1.0, 1.0))
    with heartbeat(path):
        while path.stat().st_mtime == 1.0:
            time.sleep(0.01)
    os.utime(path, (1.0, 1.0))
    assert not any(thread.name == "sign of life" for thread in threading.enumerate())


def test_a_process_of_this_machine_that_is_gone_is_not_running(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert state(stage(tmp_path / "a", "sft", 4, host=socket.gethostname(), pid=ended.pid)) == "stopped"
    assert state(stage(tmp_path / "b", "sft", 4, host=socket.gethostname(), pid=os.getpid())) == "running"


def test_figures(tmp_path):
    place = stage(tmp_path, "sft", 40)
    kept, damaged = checkpoint(place, 20), checkpoint(place, 30)
    (damaged / "weights" / "a.distcp").write_bytes(b"")
    checkpoint(place, 40).with_name("step=40-unfinished").touch()
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "ti')  # a line that is being written
    found = read_stage(place, NOW + 5)
    assert (found.step, found.max_steps, found.loss) == (40, 100, 0.2)
    assert found.rate("tokens", "seconds") == pytest.approx(100) and found.rate("mfu") == pytest.approx(0.31)
    assert found.seconds_left() == pytest.approx(60 * 10.0)
    assert found.checkpoint == kept
    assert StageProgress("x", tmp_path).seconds_left() is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (40, "40 s"), (60 * 12, "12 min"), (4 * 3600 + 300, "4 h 05 min"), (2 * 86400 + 3 * 3600, "2 d 3 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def whole_run(tmp_path):
    """Stage 1 finished, stage 2 failed, stage 3 not begun."""
    folder = tmp_path / "run"
    first, second = stage(folder, "pretrain", 100, last=NOW - 5000), stage(folder, "sft", 40, bad=1)
    checkpoint(first, 100)
    finish(first, 100)
    append(second / "errors.jsonl", {"time": NOW + 1, "message": "no such shard: <b>x</b>"})
    append(second / "faults.jsonl", {"step": 7, "fault": "loss is not finite", "records": ["a:1"]})
    append(second / "validation.jsonl", {"step": 40, "losses": {"held": 1.25, "other": None}})
    return folder


def test_status_command(whole_run, capsys):
    assert command.main(["status", str(whole_run)]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert rows[1][:5] == ["pretrain", "finished", "100/100", "0.0800", "100"]
    assert rows[2][:3] == ["sft", "failed", "40/100"] and rows[3][:2] == ["long", "waiting"]
    assert "sft: error: no such shard" in shown and "held 1.2500, other -" in shown
    assert "1 step skipped, the last at 7: loss is not finite" in shown
    assert max(map(len, shown.splitlines()[:4])) <= 80
    assert command.main(["status", str(whole_run), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["state"] for line in lines] == ["finished", "failed", "waiting"]


def test_status_needs_no_torch(whole_run):
    code = (
        f"import sys; from molmo2_nemo.cli.main import main; main(['status', {str(whole_run)!r}]); "
        "bad = [m for m in ('torch', 'nemo', 'megatron', 'transformers') if m in sys.modules]; "
        "sys.exit(f'{bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_report_is_one_page_with_curves(whole_run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert command.main(["report", str(whole_run), "--out", str(out)]) == 0
    page = out.read_text()
    assert capsys.readouterr().out.strip() == str(out)
    assert not re.search(r"(src|href)=[\"']?(?!#)|<script|@import|url\(http", page.replace('xlink:href="#', ""))
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) == 9  # the first chart twice: for wide screens and for phones
    for svg in svgs:
        ET.fromstring(svg)
    assert "&lt;b&gt;x&lt;/b&gt;" in page and "<b>x</b>" not in page and "text &lt;1&gt;" in page
    assert "loss is not finite (a:1)" in page and "3 records skipped" in page
    assert "validation, held" in page and "validation, other" not in page  # which has no loss to show


@pytest.mark.parametrize("verb", ["status", "report"])
def test_wrong_folders(verb, tmp_path, capsys):
    for folder, said in ((tmp_path / "absent", "no such folder"), (tmp_path, "no stage with a config.yaml")):
        assert command.main([verb, str(folder)]) == USER_ERROR
        assert said in capsys.readouterr().err


def test_a_folder_of_runs_names_them(tmp_path):
    for name in ("first", "second"):
        stage(tmp_path / name, "sft", 0)
    named = f"name the output_dir of a run ({tmp_path}/first, {tmp_path}/second), or a stage inside it"
    with pytest.raises(UserError, match=re.escape(named)):
        read_run(tmp_path, NOW)
    for number in range(5):
        stage(tmp_path / f"more{number}", "sft", 0)
    with pytest.raises(UserError, match=r"/more4, \.\.\.\), or a stage"):
        read_run(tmp_path, NOW)


def test_a_page_stays_where_there_is_no_room_for_the_next(tmp_path):
    """A real file system without room: a limit on the size of files."""
    stage(tmp_path, "sft", 3)
    page = tmp_path / "report.html"
    page.write_text("an earlier page")
    words = f"ulimit -f 1; exec {sys.executable} -m molmo2_nemo.cli.main report {tmp_path}"
    told = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert told.returncode == USER_ERROR and f"{page}: File too large" in told.stderr
    assert page.read_text() == "an earlier page" and sorted(tmp_path.iterdir()) == [page, tmp_path / "sft"]


def test_report_before_the_first_step(tmp_path, capsys):
    stage(tmp_path, "sft", 0)
    assert command.main(["report", str(tmp_path)]) == USER_ERROR
    assert "no stage has finished a step yet" in capsys.readouterr().err
    assert [(s.name, s.state) for s in read_run(tmp_path, NOW)] == [("sft", "starting")]
