"""Sweeps in Hydra's grammar, compared with Hydra's own sweeper; what is no sweep, and what is refused."""

from __future__ import annotations

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.compose import compose, group_options
from molmo2_nemo.settings.multirun import MOST, read_sweep

SWEPT = [
    ["stage.optim.llm.lr=1e-5,2e-5"],
    ["recipe=tiny", "stage.optim.llm.lr=choice(1e-5,2e-5)", "seed=1,2,3"],
    ["stage.max_steps=range(10,40,10)", "parallel=single,dp2"],
    ["stages=[pretrain],[pretrain,sft]"],
    ["data.sources.demo={path:a},{path:b}"],
    ["log.wandb=null,'a b'", "seed=sort(3,1,2)"],
    ["seed=1,2", "seed=3,4"],
    ["seed=5", "stage.max_steps=1,2", "seed=6"],
]


@pytest.mark.parametrize("overrides", SWEPT, ids=" ".join)
def test_jobs_are_those_of_hydras_own_sweeper(overrides):
    found = read_sweep(overrides)
    parsed = OverridesParser.create().parse_overrides(overrides)
    (theirs,) = BasicSweeper.split_arguments(parsed, None)
    assert len(found.jobs) == len(theirs) > 1
    assert [sorted([*found.fixed, *job]) for job in found.jobs] == [sorted(job) for job in theirs]


def test_groups_by_a_glob():
    found = read_sweep(["recipe=tiny", "parallel=glob(tp*,exclude=*sp)"])
    wanted = [name for name in group_options("parallel") if name.startswith("tp") and not name.endswith("sp")]
    assert [job for job in found.jobs] == [[f"parallel={name}"] for name in wanted] and len(wanted) > 1


def test_a_stage_of_a_pipeline():
    found = read_sweep(["recipe=tiny", "sft:stage.optim.llm.lr=1e-5,2e-5", "stage.max_steps=3,4"])
    assert found.fixed == ["recipe=tiny"]
    assert found.jobs[0] == ["sft:stage.optim.llm.lr=1e-05", "stage.max_steps=3"] and len(found.jobs) == 4


def test_what_is_no_sweep_stays_as_it_is():
    for text in ("data.root=/a=b,c", "data.progression=[{until_step:1,sequence_length:64}]", "output_dir='a,b'"):
        assert read_sweep([text, "seed=1,2"]).fixed == [text]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["recipe=tiny", "seed=1"], "no setting has several values; write such as stage.optim.llm.lr=1e-5,2e-5"),
        (["seed=interval(0,1)"], "seed=interval(0,1): an interval has no list of values to run; write choice(...)"),
        (["seed=1,1"], "the same value twice"),
        (["output_dir=a,b"], "jobs of a sweep share it"),
        (["parallel=glob(x*)"], "parallel=glob(x*): stands for no value"),
        (["seed=range(0,100000)"], f"100,000 jobs are more than {MOST:,}"),
    ],
)
def test_what_is_refused(overrides, said):
    with pytest.raises(UserError) as refused:
        read_sweep(overrides)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "override", ["parallel=single,dp2", "stage.max_steps=1,2", "seed=range(3)", "seed=choice(1,2)"]
)
def test_several_values_without_multirun(override):
    with pytest.raises(
        UserError, match=r"several values; with --multirun \(molmo2 train, pipeline\) each makes a run"
    ) as refused:
        compose(["recipe=tiny", override])
    assert str(refused.value).startswith(override)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("hydra.run.dir=runs/x", "hydra.run.dir has no effect here: a run's folder is output_dir=runs/x"),
        ("hydra.sweep.dir=runs/x", "a sweep's folder is output_dir=runs/x"),
        ("hydra/launcher=submitit_slurm", "cluster=slurm with --multirun submits each job"),
        ("+hydra.launcher.timeout_min=60", "cluster=slurm with --multirun submits each job"),
        ("hydra/sweeper=optuna", "choice(...), range(...) and glob(...) on the command line are swept"),
        ("hydra.searchpath=[file://x]", "--config-dir DIR adds a folder"),
        ("hydra.output_subdir=null", "runs are started by this command and not by Hydra"),
    ],
)
def test_hydras_own_settings_are_answered_with_ours(key, said):
    with pytest.raises(UserError) as refused:
        compose(["recipe=tiny", key])
    assert said in str(refused.value)


MINE = """\
defaults:
  - config
  - override recipe: tiny
  - override stage: long
  - override parallel: single
  - _self_
stage: {max_steps: 7}
output_dir: runs/mine
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "bare.yaml").write_text("seed: 3\n")
    return tmp_path


def test_a_primary_configuration_of_ones_own(mine):
    cfg = compose([], mine, "mine")
    assert (cfg.stage.name, cfg.stage.max_steps, cfg.output_dir, cfg.parallel.context) == ("long", 7, "runs/mine", 1)
    wanted = compose(["recipe=tiny", "stage=long", "parallel=single", "stage.max_steps=7", "output_dir=runs/mine"])
    assert cfg == wanted
    changed = compose(["stage=sft", "stage.max_steps=9", "parallel=tp2"], mine, "mine.yaml")
    assert (changed.stage.name, changed.stage.max_steps, changed.parallel.tensor) == ("sft", 9, 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mien", "no file mien.yaml in "),
        ("8b", "recipe=8b is chosen without it"),
        ("bare", "bare.yaml does not build on this project's settings; begin it with `defaults: [config, _self_]`"),
    ],
)
def test_other_names_of_primary_configurations(mine, name, said):
    with pytest.raises(UserError) as refused:
        compose([], mine, name)
    assert said in str(refused.value)


def test_a_primary_configuration_that_would_be_hidden(mine):
    (mine / "config.yaml").write_text(MINE)
    with pytest.raises(UserError, match="would not be read, but the shipped one"):
        compose([], mine, "config")
