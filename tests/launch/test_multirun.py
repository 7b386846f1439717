"""Sweeps: folders, numbers that stay, one job that fails beside others that do not, and the table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.errors import INTERRUPTED, UserError
from molmo2_nemo.files import write_json
from molmo2_nemo.launch.multirun import run_sweep, short
from molmo2_nemo.launch.pipeline import compose_stages
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.paths import METRICS, MULTIRUN, SUMMARY, VALIDATION, stage_dir
from molmo2_nemo.rundir.progress import read_run
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.multirun import read_sweep

STEP = {"tokens": 100, "padded_tokens": 128, "seconds": 30.0}


def finish(cfg, loss: float) -> None:
    """The files of a stage that has trained, with this last loss."""
    folder = stage_dir(cfg)
    write_config(cfg)
    lines = [{"step": n + 1, "loss": loss + 1 - n, "time": 1e9 + n, **STEP} for n in range(2)]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / VALIDATION).write_text(json.dumps({"step": 2, "losses": {"held": loss + 0.5}}) + "\n")
    (folder / "checkpoints" / "step=2").mkdir(parents=True, exist_ok=True)
    write_json(folder / SUMMARY, {"stage": cfg.stage.name, "steps": 2, "checkpoint": "checkpoints/step=2"})


@pytest.fixture
def sweep(tmp_path):
    """Runs a sweep of the tiny recipe with a given stand-in for training; its exit code."""

    def call(values: str, train, *more: str) -> int:
        words = ["recipe=tiny", f"output_dir={tmp_path}/sweep", "stage.max_steps=2", values, *more]
        return run_sweep(read_sweep(words), lambda overrides: [compose(overrides)], train)

    return call


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "multirun.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_job_that_fails_hides_no_other_and_the_same_command_goes_on(sweep, tmp_path, capsys):
    trained: list[float] = []
    broken = True

    def train(configs) -> int:
        (cfg,) = configs
        rate = cfg.stage.optim.llm.lr
        if (stage_dir(cfg) / SUMMARY).is_file():
            return 0
        trained.append(rate)
        if rate == 2e-5 and broken:
            write_config(cfg)
            raise UserError("no such shards")
        if rate == 3e-5 and broken:
            return 137
        finish(cfg, loss=1e5 * rate)
        return 0

    assert sweep("stage.optim.llm.lr=1e-5,2e-5,3e-5,4e-5", train) == 2  # of the first that failed
    said = capsys.readouterr()
    assert trained == [1e-5, 2e-5, 3e-5, 4e-5]
    assert "molmo2: error: job 1: no such shards" in said.err
    assert f"job 1: exit code 2; its folder is {tmp_path}/sweep/1" in said.out and "job 2: exit code 137" in said.out
    table = rows(tmp_path / "sweep")
    assert [row["stage.optim.llm.lr"] for row in table] == ["1e-05", "2e-05", "3e-05", "4e-05"]
    assert [row["state"] for row in table] == ["finished", "failed (2)", "failed (137)", "finished"]
    assert table[3] == {
        **{"job": "3", "stage.optim.llm.lr": "4e-05", "state": "finished", "step": "2", "loss": "4.0000"},
        **{"validation": "held 4.5000", "scores": "", "time": "1 min"},
    }
    shown = [line.split() for line in said.out.splitlines() if line.startswith(("job", "  3"))]
    assert ["job", "lr", "state", "step", "loss", "validation", "time"] in shown
    assert all(len(line) <= 80 for line in said.out.splitlines() if not line.startswith("job "))

    broken = False
    trained.clear()
    assert sweep("stage.optim.llm.lr=2e-5,3e-5,1e-5,5e-5", train) == 0  # another order, and one more
    assert trained == [2e-5, 3e-5, 5e-5]
    assert [row["job"] for row in rows(tmp_path / "sweep")] == ["1", "2", "0", "4"]
    jobs = json.loads((tmp_path / "sweep" / MULTIRUN).read_text())["jobs"]
    assert jobs[0] == {"number": 0, "overrides": ["stage.optim.llm.lr=1e-05"]}
    assert [job["number"] for job in jobs] == [0, 1, 2, 3, 4]
    for number, rate in enumerate((1e-5, 2e-5, 3e-5, 4e-5, 5e-5)):
        (stage,) = read_run(tmp_path / "sweep" / str(number))
        assert stage.config is not None and stage.config.stage.optim.llm.lr == rate
    with pytest.raises(UserError, match=r"is the folder of a sweep; name one of its jobs: .*/NUMBER \(0, 1, 2, 3, 4\)"):
        read_run(tmp_path / "sweep")


def test_ctrl_c_ends_the_sweep(sweep, tmp_path, capsys):
    def train(configs) -> int:
        if configs[0].seed == 2:
            raise KeyboardInterrupt
        finish(configs[0], loss=1.0)
        return 0

    assert sweep("seed=1,2,3,4", train) == INTERRUPTED
    assert "stopped before 2 of 4 jobs; the same command goes on" in capsys.readouterr().out
    assert [row["state"] for row in rows(tmp_path / "sweep")] == ["finished", "waiting", "waiting", "waiting"]


def test_a_fault_of_ours_stops_no_other_job(sweep, capsys):
    def train(configs) -> int:
        if configs[0].seed == 1:
            raise AssertionError("ours")
        return 0

    assert sweep("seed=1,2", train) == 1
    assert "AssertionError: ours" in capsys.readouterr().err


def test_nothing_starts_while_a_job_cannot_be_composed(sweep, tmp_path):
    with pytest.raises(UserError, match=r"job 1 \(parallel=dp3\): unknown choice parallel=dp3; did you mean 'dp2'"):
        sweep("parallel=dp2,dp3", lambda configs: pytest.fail("started"))
    assert not (tmp_path / "sweep").exists()


def test_a_runs_folder_is_no_sweeps(sweep, tmp_path):
    write_config(compose(["recipe=tiny", f"output_dir={tmp_path}/sweep"]))
    with pytest.raises(UserError, match=r"is the folder of a run \(sft\); give the sweep one of its own"):
        sweep("seed=1,2", lambda configs: 0)


def test_recipes_need_a_common_folder():
    with pytest.raises(UserError, match="recipes have folders of their own; write output_dir="):
        run_sweep(read_sweep(["recipe=tiny,needle"]), lambda overrides: [compose(overrides)], lambda configs: 0)


def test_not_inside_a_job(sweep, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="--multirun starts runs; inside a torchrun or Slurm job leave it out"):
        sweep("seed=1,2", lambda configs: 0)


def test_a_damaged_record(sweep, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / MULTIRUN).write_text('{"jobs": [{"number": 0}]}')
    with pytest.raises(UserError, match="multirun.json is damaged"):
        sweep("seed=1,2", lambda configs: 0)


def test_all_stages_of_a_pipeline(tmp_path, capsys):
    seen = []

    def run(configs) -> int:
        seen.append([(cfg.stage.name, cfg.stage.max_steps, cfg.output_dir) for cfg in configs])
        for cfg in configs[:2]:
            finish(cfg, loss=3.0)
        return 0

    words = ["recipe=tiny", f"output_dir={tmp_path}", "stage.max_steps=2", "sft:stage.max_steps=2,3"]
    assert run_sweep(read_sweep(words), compose_stages, run) == 0
    assert seen[1] == [(name, 3 if name == "sft" else 2, f"{tmp_path}/1") for name in ("pretrain", "sft", "long")]
    first, second = rows(tmp_path)
    assert (first["stage"], first["state"], first["time"]) == ("sft", "waiting", "2 min")
    assert second["sft:stage.max_steps"] == "3"


@pytest.mark.parametrize("verb", ["train", "pipeline"])
def test_a_script_for_each_job_on_slurm(verb, tmp_path, capsys):
    words = ["recipe=tiny", "cluster=slurm", "cluster.precision=fp32", f"output_dir={tmp_path}", "cluster.nodes=1"]
    words += ["parallel=single", "cluster.devices=1", "stage.optim.llm.lr=1e-5,2e-5", "--dry-run"]
    assert main([verb, "--multirun", *words]) == 0
    shown = capsys.readouterr().out
    for number in (0, 1):
        assert f"{tmp_path}/{number}/slurm/sft.yaml" in shown and f"{tmp_path.name}-{number}.sft" in shown
    assert not (tmp_path / MULTIRUN).exists()


def test_short_names_tell_keys_apart():
    keys = ["stage.optim.llm.lr", "stage.optim.vit.lr", "seed"]
    assert [short(key, keys) for key in keys] == ["llm.lr", "vit.lr", "seed"]
    assert short("stage.optim.llm.lr", ["stage.optim.llm.lr", "seed"]) == "lr"
