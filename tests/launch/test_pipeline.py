"""Which stages run, which are skipped, and what is refused. Only the training of a stage is replaced."""

from __future__ import annotations

import json

import pytest

from molmo2_nemo.errors import INTERRUPTED, UserError
from molmo2_nemo.launch.pipeline import compose_stages, run_stages
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.paths import stage_dir
from molmo2_nemo.settings.compose import STAGES


class Trainer:
    """Stands where `launch` stands: leaves the files a finished stage leaves."""

    def __init__(self, fail_at=None, code=1):
        self.ran, self.starts, self.fail_at, self.code = [], [], fail_at, code

    def __call__(self, cfg):
        write_config(cfg)
        self.ran.append(cfg.stage.name)
        self.starts.append(cfg.init_from)
        if cfg.stage.name == self.fail_at:
            return self.code
        folder = stage_dir(cfg)
        checkpoint = folder / "checkpoints" / f"step={cfg.stage.max_steps}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(
            json.dumps({"steps": cfg.stage.max_steps, "checkpoint": f"checkpoints/{checkpoint.name}"})
        )
        return 0


def stages(tmp_path, *overrides):
    return compose_stages(["recipe=tiny", f"output_dir='{tmp_path}'", *overrides])


def test_each_stage_starts_from_the_one_before(tmp_path):
    trainer = Trainer()
    assert run_stages(stages(tmp_path, "stage.max_steps=7"), trainer) == 0
    assert trainer.ran == list(STAGES)
    before = [str(tmp_path / name / "checkpoints" / "step=7") for name in ("pretrain", "sft")]
    assert trainer.starts == [None, *before]


def test_finished_stages_are_skipped(tmp_path, capsys):
    run_stages(stages(tmp_path), Trainer())
    again = Trainer()
    assert run_stages(stages(tmp_path), again) == 0
    assert again.ran == [] and capsys.readouterr().out.count("skipped") == 3


@pytest.mark.parametrize("code", [1, INTERRUPTED])
def test_an_unfinished_stage_runs_again(tmp_path, code):
    assert run_stages(stages(tmp_path), Trainer(fail_at="sft", code=code)) == code
    again = Trainer()
    assert run_stages(stages(tmp_path), again) == 0
    assert again.ran == ["sft", "long"]
    assert again.starts[0] is not None and "pretrain" in again.starts[0]


def test_other_settings_for_a_finished_stage_are_refused(tmp_path):
    run_stages(stages(tmp_path), Trainer())
    with pytest.raises(UserError) as error:
        run_stages(stages(tmp_path, "sft:stage.max_steps=9"), Trainer())
    assert "stage.max_steps was" in str(error.value) and "is now 9" in str(error.value) and "sft" in str(error.value)


def test_settings_that_do_not_matter_may_change(tmp_path):
    run_stages(stages(tmp_path), Trainer())
    again = Trainer()
    assert run_stages(stages(tmp_path, "save_every=3", "data.num_workers=2", "cluster.threads=2"), again) == 0
    assert again.ran == []


def test_a_stage_after_an_unfinished_one_is_refused(tmp_path):
    run_stages(stages(tmp_path), Trainer())
    (tmp_path / "pretrain" / "summary.json").unlink()
    with pytest.raises(UserError, match="sft is finished, but pretrain, which it starts from, is not"):
        run_stages(stages(tmp_path), Trainer())
    for name in ("sft", "long"):
        (tmp_path / name / "summary.json").unlink()
    with pytest.raises(UserError, match="sft was trained, but pretrain, which it starts from, is not"):
        run_stages(stages(tmp_path), Trainer())


def test_a_finished_stage_that_is_to_have_more_steps_goes_on(tmp_path):
    settings = stages(tmp_path, "stage.max_steps=7")
    run_stages(settings, Trainer(fail_at="sft"))
    again = Trainer()
    assert run_stages(stages(tmp_path, "stage.max_steps=9"), again) == 0
    assert again.ran == list(STAGES) and again.starts[1] == str(tmp_path / "pretrain" / "checkpoints" / "step=9")


def test_a_lost_checkpoint_and_a_damaged_summary_are_named(tmp_path):
    run_stages(stages(tmp_path), Trainer())
    path = tmp_path / "long" / "summary.json"
    path.write_text(json.dumps({"checkpoint": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="which is gone"):
        run_stages(stages(tmp_path), Trainer())
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        run_stages(stages(tmp_path), Trainer())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stage=sft", "molmo2 train stage=sft"),
        ("sft:stage.name=x", "the pipeline runs all stages"),
        ("sfd:stage.max_steps=2", "did you mean 'sft'?"),
        ("init_from=/x", "pretrain:init_from"),
        ("long:init_from=/x", "each stage starts from the one before"),
    ],
)
def test_what_belongs_to_the_pipeline(tmp_path, override, expected):
    with pytest.raises(UserError, match=expected.replace("?", r"\?")):
        stages(tmp_path, override)


def test_settings_for_one_stage(tmp_path):
    configs = stages(tmp_path, "stage.max_steps=5", "long:stage.max_steps=3", "pretrain:init_from=/weights")
    assert [c.stage.max_steps for c in configs] == [5, 5, 3]
    assert [c.init_from for c in configs] == ["/weights", None, None]
