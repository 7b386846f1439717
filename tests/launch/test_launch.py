"""Exit codes and the one message that a failed run ends with."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from molmo2_nemo.errors import INTERRUPTED, PREEMPTED, USER_ERROR, UserError
from molmo2_nemo.launch import local, reports, worker
from molmo2_nemo.launch.slurm.step import adopt_slurm
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.lines import read_lines, read_metrics
from molmo2_nemo.rundir.lock import only_run
from molmo2_nemo.rundir.paths import stage_dir
from molmo2_nemo.rundir.resume import refuse_other_run
from molmo2_nemo.rundir.summary import resolve_checkpoint
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.run import RunConfig


@pytest.fixture
def run_worker(monkeypatch, tmp_path):
    """Runs `worker.run` with a training function of the test's; returns (exit code, report or None)."""

    def run(train):
        module = types.ModuleType("molmo2_nemo.nemo.train")
        module.train = train
        monkeypatch.setitem(sys.modules, "molmo2_nemo.nemo.train", module)
        monkeypatch.setattr(worker, "quiet", lambda: None)
        monkeypatch.setenv(reports.ERROR_DIR, str(tmp_path))
        code = worker.run(RunConfig(output_dir=str(tmp_path)))
        path = tmp_path / "rank0.json"
        return code, json.loads(path.read_text()) if path.is_file() else None

    return run


def raise_(error):
    raise error


def test_a_users_mistake_is_one_line(run_worker, tmp_path, capsys):
    def mistake(_):
        resolve_checkpoint("/absent")

    code, report = run_worker(mistake)
    assert code == USER_ERROR and report["user_error"]
    assert reports.explain_exit(tmp_path, code) == USER_ERROR
    assert capsys.readouterr().err == "molmo2: error: /absent: no such checkpoint or run folder\n"


def test_a_fault_of_ours_keeps_its_traceback(run_worker, tmp_path, capsys):
    code, report = run_worker(lambda _: raise_(KeyError("decoder")))
    assert code == 1 and not report["user_error"]
    assert reports.explain_exit(tmp_path, code) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("molmo2: error: process 0 failed: KeyError: 'decoder'\n")


def test_a_value_error_inside_a_library_is_not_the_users(run_worker):
    import numpy as np

    code, report = run_worker(lambda _: np.zeros(3).reshape(2))
    assert code == 1 and not report["user_error"]


def test_a_value_error_of_this_package_is_not_the_users_either(run_worker):
    code, report = run_worker(lambda _: raise_(ValueError("x")))
    assert code == 1 and not report["user_error"] and report["message"] == "ValueError: x"


def test_missing_files_are_the_users_and_lost_connections_are_not(run_worker, tmp_path):
    code, report = run_worker(lambda _: (tmp_path / "absent").read_text())
    assert code == USER_ERROR and report["message"] == f"{tmp_path}/absent: No such file or directory"
    code, report = run_worker(lambda _: raise_(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")))
    assert code == 1 and not report["user_error"] and report["message"].startswith("ConnectionResetError: ")


def test_a_wrong_import_of_ours_is_no_missing_package(run_worker):
    code, report = run_worker(lambda _: __import__("molmo2_nemo.no_such_module"))
    assert code == 1 and not report["user_error"] and "doctor" not in report["message"]


def test_interrupted_and_success(run_worker):
    assert run_worker(lambda _: raise_(KeyboardInterrupt())) == (INTERRUPTED, None)
    assert run_worker(lambda _: {}) == (0, None)


def test_a_missing_package_points_to_doctor(run_worker):
    code, report = run_worker(lambda _: __import__("a_package_nobody_has"))
    assert code == USER_ERROR and "molmo2 doctor" in report["message"]


def _report(folder, rank, time, message, user_error):
    report = {"rank": rank, "time": time, "message": message, "traceback": f"tb{rank}\n", "user_error": user_error}
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


def test_the_first_failure_of_several_is_told(tmp_path, capsys):
    _report(tmp_path, 0, 20.0, "RuntimeError: connection closed by peer", False)
    _report(tmp_path, 1, 10.0, "ZeroDivisionError: the cause", False)
    assert reports.explain_exit(tmp_path, 1) == 1
    err = capsys.readouterr().err
    assert "process 1 failed: ZeroDivisionError: the cause" in err and "peer" not in err


def test_a_users_mistake_wins_over_what_follows_from_it(tmp_path, capsys):
    _report(tmp_path, 0, 10.0, "RuntimeError: connection closed by peer", False)
    _report(tmp_path, 1, 20.0, "no such shard", True)
    assert reports.explain_exit(tmp_path, 1) == USER_ERROR
    assert capsys.readouterr().err == "molmo2: error: no such shard\n"


def test_a_killed_process_is_named(tmp_path, capsys):
    (tmp_path / "launcher.json").write_text(json.dumps({"rank": 1, "exit_code": -signal.SIGKILL}))
    assert reports.explain_exit(tmp_path, 9) == 128 + signal.SIGKILL
    assert "process 1 was ended by SIGKILL" in capsys.readouterr().err


def test_children_end_with_their_code():
    assert local.run_child([sys.executable, "-c", "raise SystemExit(7)"], {}) == 7
    own = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"  # nobody asked the run to stop
    assert local.run_child([sys.executable, "-c", own], {}) == -signal.SIGTERM


def test_a_signal_before_the_child_exists_reaches_it(monkeypatch):
    class SignalledFirst(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(subprocess, "Popen", SignalledFirst)
    assert local.run_child([sys.executable, "-c", "import time; time.sleep(60)"], {}) == PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("leaves_with", "code"), [(3, INTERRUPTED), (0, 0)])
def test_an_interrupt_of_the_command_alone_reaches_its_child(monkeypatch, leaves_with, code):
    """`kill -INT` and supervisors send it to one process, a terminal to both."""
    monkeypatch.setattr(local, "HEARD", 0.1)
    child = f"import os, signal\nsignal.signal(signal.SIGINT, lambda *_: os._exit({leaves_with}))\n"
    child += "os.kill(os.getppid(), signal.SIGINT)\nsignal.alarm(60)\nwhile True: signal.pause()"
    before = local.signals_passed()
    assert local.run_child([sys.executable, "-c", child], dict(os.environ)) == code
    assert local.signals_passed() == before + 1, "a pipeline begins nothing after it"


def test_a_child_that_left_by_itself_is_not_interrupted_twice(monkeypatch):
    monkeypatch.setattr(local, "HEARD", 60.0)
    child = "import os, signal\nos.kill(os.getppid(), signal.SIGINT)\nraise SystemExit(5)"
    assert local.run_child([sys.executable, "-c", child], dict(os.environ)) == INTERRUPTED


@pytest.mark.parametrize("module", [local.WORKER, local.ELASTIC])
def test_an_interrupt_during_the_imports_leaves_no_traceback(tmp_path, module):
    """One that comes when launch.reports, which both import, is looked for."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'molmo2_nemo.launch.reports':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    env = {**os.environ, "PYTHONPATH": path}
    cut = subprocess.run([sys.executable, "-m", module, "x", "y"], env=env, capture_output=True, text=True)
    assert cut.returncode == -signal.SIGINT and cut.stderr == ""


def test_a_child_that_cannot_be_started_leaves_the_handlers_as_they_were(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError):
        local.run_child([str(tmp_path / "absent")], {})
    assert signal.getsignal(signal.SIGTERM) == before


def test_slurm_variables_become_torchs():
    env = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "16",
        "SLURM_NNODES": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "70042",
        "MASTER_ADDR": "n1",
    }
    adopt_slurm(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["MASTER_PORT"]) == ("3", "16", "1", "30042")
    assert env["LOCAL_WORLD_SIZE"] == "2"
    alone = {"SLURM_STEP_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "MASTER_ADDR": "n1"}
    adopt_slurm(alone)
    assert (alone["RANK"], alone["WORLD_SIZE"]) == ("0", "1")
    for step in ({}, {"SLURM_STEP_ID": str(0xFFFFFFFA)}, {"SLURM_STEP_ID": str(0xFFFFFFFB)}):
        shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", **step}  # of sbatch, or of salloc
        adopt_slurm(shell)
        assert "RANK" not in shell


def test_slurm_outside_a_job_says_what_to_do(monkeypatch):
    for name in ("SLURM_STEP_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="start it with srun"):
        local.launch(compose(["recipe=8b"]))


def test_metrics_of_a_run_that_was_cut_and_resumed(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 2.5}]
    text = "\n".join(json.dumps(r) for r in rows) + '\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 3.0), (2, 2.5)]


def test_a_summary_holds_wherever_the_folder_goes(tmp_path):
    """Also those of earlier versions, which have the path of the day; the old run may still be there."""
    old, new = tmp_path / "old" / "sft", tmp_path / "new" / "sft"
    (old / "checkpoints" / "step=3").mkdir(parents=True)
    for path in ("checkpoints/step=3", "old/sft/checkpoints/step=3", str(old / "checkpoints" / "step=3")):
        (old / "summary.json").write_text(json.dumps({"steps": 3, "checkpoint": path}))
        shutil.copytree(old, new)
        assert resolve_checkpoint(new) == new / "checkpoints" / "step=3"
        shutil.rmtree(new)


def trained(tmp_path, *settings):
    """A stage that stopped at step 3 of 8; a function that composes it with other settings."""
    data = "data.sources={a: {path: /shards/a}}"

    def composed(*changes):
        return compose(["recipe=tiny", "stage=sft", f"output_dir={tmp_path}", "stage.max_steps=8", data, *changes])

    write_config(composed(*settings))
    (tmp_path / "sft" / "checkpoints" / "step=3").mkdir(parents=True)
    return composed


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.packing.sequence_length=512", "data.packing.sequence_length was"),
        ("stage.lora.rank=4", "stage.lora.rank was 0, is now 4"),
        ("stage.max_steps=2", "stage.max_steps was 8, is now 2"),
        ("stage.optim.llm.lr=7e-3", "stage.optim.llm.lr was"),
        ("stage.global_batch_size=16", "stage.global_batch_size was"),
        ("data.sources.b.path=/shards/b", "data.sources.b.rate was None, is now 1.0"),
        ("seed=1", "seed was"),
        ("parallel.distributed_optimizer=false", "parallel.distributed_optimizer was True, is now False"),
    ],
)
def test_a_run_is_not_gone_on_with_as_another(tmp_path, change, told):
    composed = trained(tmp_path)
    before = (tmp_path / "sft" / "config.yaml").read_text()
    with pytest.raises(UserError) as error:
        refuse_other_run(composed(change))
    assert told in str(error.value) and f"init_from={tmp_path}/sft/checkpoints/step=3" in str(error.value)
    assert (tmp_path / "sft" / "config.yaml").read_text() == before


def test_what_may_differ_between_two_attempts(tmp_path):
    composed = trained(tmp_path)
    layout = ("parallel=tp2cp2", "parallel.data=8", "memory.recompute=full", "cluster.nodes=2", "model.attention=flex")
    limits = ("faults.max_total=500", "data.max_bad_share=1.0", "save_every=3", "validation.every=7")
    moved = ("stage.micro_batch_size=1", "data.sources.a.path=/moved/a", "stage.max_steps=80")
    refuse_other_run(composed(*layout, *limits, *moved))


def test_without_a_checkpoint_anything_goes(tmp_path, capsys):
    composed = trained(tmp_path)
    (tmp_path / "sft" / "checkpoints" / "step=3-unfinished").touch()
    refuse_other_run(composed("seed=1"))
    (tmp_path / "sft" / "checkpoints" / "step=3-unfinished").unlink()
    refuse_other_run(composed("stage.max_steps=80", "init_from=elsewhere"))
    said = capsys.readouterr().out
    assert "init_from=elsewhere is not read: sft resumes from" in said and "stage.max_steps was 8, is now 80" in said


def test_the_line_for_several_nodes_is_whole(tmp_path):
    cfg = compose(["recipe=tiny", f"output_dir={tmp_path}", "cluster.nodes=2", "cluster.devices=4"])
    line = local.start_by_hand(cfg, tmp_path / "sft" / "config.yaml").partition("FIRST_NODE: ")[2]
    assert line.startswith("torchrun --nnodes=2 --nproc-per-node=4 ")
    assert line.endswith(f"-m molmo2_nemo.cli.main train --config {tmp_path}/sft/config.yaml")


def test_a_run_that_has_saved_nothing_yet(tmp_path):
    write_config(compose(["recipe=tiny", "stage=sft", f"output_dir={tmp_path}"]))
    for place in (tmp_path / "sft", tmp_path):
        with pytest.raises(UserError, match="has not saved a checkpoint yet; molmo2 status"):
            resolve_checkpoint(place)


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with only_run(tmp_path):
        with pytest.raises(UserError, match="another run is at work"), only_run(tmp_path):
            pass
    with only_run(tmp_path):
        pass


def test_a_torch_that_cannot_be_imported_is_reported(tmp_path):
    """By a worker, which looks for a snapshot of memory when it fails, and needs no torch for that."""
    (tmp_path / "torch.py").write_text("raise ImportError('libmade.so: cannot open shared object file')")
    cfg = compose(["recipe=tiny", "stage=sft", f"output_dir={tmp_path}/run"])
    write_config(cfg)
    file = stage_dir(cfg) / "config.yaml"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    command = [sys.executable, "-m", "molmo2_nemo.launch.worker", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "During handling" not in done.stderr, done.stderr
    (error,) = read_lines(stage_dir(cfg) / "errors.jsonl")
    assert "libmade.so" in error["message"] and "launch/worker.py" in error["traceback"]
