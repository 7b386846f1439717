"""Which stages run, which are skipped, and what is refused. Only the training of a stage is replaced."""

from __future__ import annotations

import json
import os
import sys

import pytest

from molmo2_nemo.errors import INTERRUPTED, PREEMPTED, UserError
from molmo2_nemo.launch.local import run_child
from molmo2_nemo.launch.pipeline import compose_stages, run_stages
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.lines import append_line
from molmo2_nemo.rundir.paths import stage_dir
from molmo2_nemo.rundir.progress import read_run
from molmo2_nemo.rundir.stages import merged
from molmo2_nemo.rundir.summary import resolve_checkpoint
from molmo2_nemo.settings.run import PUBLISHED_STAGES


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
        (checkpoint / "weights").touch()
        (folder / "summary.json").write_text(
            json.dumps({"steps": cfg.stage.max_steps, "checkpoint": f"checkpoints/{checkpoint.name}"})
        )
        return 0


@pytest.fixture(autouse=True)
def _data(monkeypatch, shards):
    monkeypatch.setenv("MOLMO2_DEMO_DATA", str(shards))


def stages(tmp_path, *overrides):
    return compose_stages(["recipe=tiny", f"output_dir='{tmp_path}'", *overrides])


def test_each_stage_starts_from_the_one_before(tmp_path):
    trainer = Trainer()
    assert run_stages(stages(tmp_path, "stage.max_steps=7"), trainer) == 0
    assert trainer.ran == list(PUBLISHED_STAGES)
    before = [str(tmp_path / name / "checkpoints" / "step=7") for name in ("pretrain", "sft")]
    assert trainer.starts == [None, *before]


def test_finished_stages_are_skipped(tmp_path, capsys):
    run_stages(stages(tmp_path), Trainer())
    again = Trainer()
    assert run_stages(stages(tmp_path), again) == 0
    assert again.ran == [] and capsys.readouterr().out.count("skipped") == 3


def test_a_finished_stage_without_scores_of_its_last_step_runs_again(tmp_path, shards):
    scored = ["stage.max_steps=7", "evaluation.tasks=[auto]", f"evaluation.data='{shards / 'sft'}'"]
    run_stages(stages(tmp_path, *scored), Trainer())
    for name, step in (("pretrain", 7), ("sft", 5), ("long", 7)):
        append_line(tmp_path / name / "evaluation.jsonl", {"step": step})
    again = Trainer()
    assert run_stages(stages(tmp_path, *scored), again) == 0 and again.ran == ["sft"]


@pytest.mark.parametrize("code", [1, INTERRUPTED])
def test_an_unfinished_stage_runs_again(tmp_path, code):
    assert run_stages(stages(tmp_path), Trainer(fail_at="sft", code=code)) == code
    again = Trainer()
    assert run_stages(stages(tmp_path), again) == 0
    assert again.ran == ["sft", "long"]
    assert again.starts[0] is not None and "pretrain" in again.starts[0]


def test_a_signal_as_a_stage_ends_begins_no_other(tmp_path, capsys):
    """The stage is through with its work and ends with 0; a real child that does not mind the signal stands for it, and
    asks its parent for one when it is ready."""
    child = "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n"
    child += "os.kill(os.getppid(), signal.SIGTERM)\nwhile True: signal.pause()"

    class Signalled(Trainer):
        def __call__(self, cfg):
            if cfg.stage.name == "sft":
                assert run_child([sys.executable, "-c", child], dict(os.environ)) == 0
            return super().__call__(cfg)

    trainer, again = Signalled(), Trainer()
    assert run_stages(stages(tmp_path), trainer) == PREEMPTED and trainer.ran == ["pretrain", "sft"]
    assert "stopped by a signal after sft; the same command goes on with the next" in capsys.readouterr().out
    assert run_stages(stages(tmp_path), again) == 0 and again.ran == ["long"]


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
    assert again.ran == list(PUBLISHED_STAGES) and again.starts[1] == str(
        tmp_path / "pretrain" / "checkpoints" / "step=9"
    )


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
        ("sft:stage.name=x", "the pipeline runs all of stages="),
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


OWN = """\
# @package _global_
defaults: [sft, _self_]
stage: {max_steps: 4}
data:
  packing: {sequence_length: 1024, max_crops: 32}
  video: {max_frames: 8}
  sources: {demo: {path: "${oc.env:MOLMO2_DEMO_DATA}/long"}}
"""


def own(tmp_path, text=OWN):
    """A folder for --config-dir with the stage `clips`."""
    (tmp_path / "conf" / "stage").mkdir(parents=True)
    (tmp_path / "conf" / "stage" / "clips.yaml").write_text(text)
    return tmp_path / "conf"


def listed(tmp_path, conf, *overrides):
    return compose_stages(["recipe=tiny", f"output_dir='{tmp_path / 'run'}'", *overrides], conf)


def test_a_list_with_a_stage_of_ones_own(tmp_path):
    """Its place in the list is its place in the run: for what starts from it, for status, for the last checkpoint."""
    conf = own(tmp_path)
    configs = listed(tmp_path, conf, "stages=[pretrain,clips,sft]", "stage.max_steps=7", "clips:stage.max_steps=3")
    assert [(c.stage.name, c.stage.max_steps) for c in configs] == [("pretrain", 7), ("clips", 3), ("sft", 7)]
    assert configs[1].stage.global_batch_size == 128  # from the stage that it is made of
    trainer = Trainer(fail_at="sft")
    assert run_stages(configs, trainer) == 1
    run = tmp_path / "run"
    assert trainer.starts[2] == str(run / "clips" / "checkpoints" / "step=3")
    assert [(s.name, s.state) for s in read_run(run)] == [
        *(("pretrain", "finished"), ("clips", "finished"), ("sft", "waiting")),
    ]
    assert resolve_checkpoint(run) == run / "clips" / "checkpoints" / "step=3"
    again = Trainer()
    assert (
        run_stages(
            listed(tmp_path, conf, "stages=[pretrain,clips,sft]", "stage.max_steps=7", "clips:stage.max_steps=3"),
            again,
        )
        == 0
    )
    assert again.ran == ["sft"] and resolve_checkpoint(run) == run / "sft" / "checkpoints" / "step=7"


def test_a_recipe_lists_its_stages(tmp_path):
    conf = own(tmp_path)
    (conf / "recipe").mkdir()
    text = "# @package _global_\ndefaults:\n  - tiny\n  - _self_\nstages: [sft, clips]\n"
    (conf / "recipe" / "mine.yaml").write_text(text)
    configs = compose_stages(["recipe=mine"], conf)
    assert [c.stage.name for c in configs] == ["sft", "clips"] and configs[0].model.preset == "tiny"
    assert all(c.stages == ["sft", "clips"] for c in configs)
    with pytest.raises(UserError, match=r"unknown stage 'pretrain'.*stages=\[sft,clips\]"):
        compose_stages(["recipe=mine", "pretrain:save_every=3"], conf)


def test_a_part_of_the_stages(tmp_path, capsys):
    """It starts where the recipe would have it start, if that is there; else that is said."""
    assert [c.init_from for c in stages(tmp_path, "stages=[sft,long]")] == [None, None]
    assert "sft does not start from pretrain, which the recipe has before it: it is left out" in capsys.readouterr().err
    run_stages(stages(tmp_path), Trainer(fail_at="sft"))
    configs = stages(tmp_path, "stages=[sft,long]")
    (start,) = (tmp_path / "pretrain" / "checkpoints").glob("step=*")
    assert [c.init_from for c in configs] == [str(start), None] and "as pretrain is finished" in capsys.readouterr().err
    again = Trainer()
    assert run_stages(configs, again) == 0 and again.ran == ["sft", "long"]
    assert [s.name for s in read_run(tmp_path)] == ["pretrain", "sft", "long"]
    assert [c.init_from for c in stages(tmp_path, "stages=[sft,long]", "sft:init_from=/x")] == ["/x", None]


def test_stages_in_another_order_than_the_recipes(tmp_path, capsys):
    """It is said, and where the run has trained them in the other order nothing is to be removed."""
    assert [c.init_from for c in stages(tmp_path, "stages=[long,sft]")] == [None, None]
    said = "long does not start from sft, which the recipe has before it: it comes after it in stages=[long,sft] and"
    assert said in capsys.readouterr().err
    run_stages(stages(tmp_path, "stages=[sft,long]"), Trainer(fail_at="long"))
    with pytest.raises(UserError, match=r"stages=\[long,sft\]: sft is finished .*there long came after it") as error:
        run_stages(stages(tmp_path, "stages=[long,sft]"), Trainer())
    assert "(stages=[sft,long])" in str(error.value) and "remove" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages=[]"], r"stages=\[\]: no stage to run; name some of align, "),
        (["stages=[sft,long,sft]"], r"stages=\[sft,long,sft\]: sft is there twice"),
        (["stages=[sft,sft]"], "a copy of conf/stage/sft.yaml in a folder that --config-dir names"),
        (["stages=[clips,sft,clips]"], "clips is there twice, .*: a copy of /.*/conf/stage/clips.yaml in a folder"),
        (["stages=[sft,lng]"], "unknown stage 'lng'; did you mean 'long'"),
        (["stages=[sft,long]", "clips:save_every=3"], "unknown stage 'clips'"),
        (["long:stages=[sft]"], "all stages have this in common; write it without long:"),
        (
            ["recipe=8b", "stages=[sft,clips]"],
            r"stage=clips: recipe=8b has no data for it .*; choose some: data=demo",
        ),
    ],
)
def test_lists_that_cannot_be_run(tmp_path, overrides, expected):
    with pytest.raises(UserError, match=expected) as error:
        listed(tmp_path, own(tmp_path), *overrides)
    assert "\n" not in str(error.value)


def test_a_stage_that_cannot_work_is_refused_before_another_starts(tmp_path):
    conf, trainer = own(tmp_path), Trainer()
    for override, expected in (
        ("clips:~data.sources.demo", "clips: data.sources is empty: nothing to train on"),
        (f"clips:data.sources.demo.path={tmp_path}/none", "clips: data.sources.demo: .*none"),
        ("clips:model.rope_scaling=yarn", "clips: model.rope_scaling=yarn needs model.rope_factor > 1"),
        ("clips:parallel.fsdp=megatron", "clips: parallel.fsdp=megatron "),
    ):
        with pytest.raises(UserError, match=expected):
            run_stages(
                listed(tmp_path, conf, "stages=[pretrain,clips]", override, "clips:data.tokenizer=tiny"), trainer
            )
    assert trainer.ran == []


def test_a_stage_has_the_name_of_its_file(tmp_path):
    conf = own(tmp_path, "# @package _global_\nstage: {name: other}\n")
    with pytest.raises(UserError, match="stage=clips: its file says stage.name=other; leave that out"):
        listed(tmp_path, conf, "stages=[sft,clips]")


def test_a_file_of_ones_own_with_a_shipped_name_is_refused(tmp_path):
    conf = own(tmp_path)
    (conf / "stage" / "clips.yaml").rename(conf / "stage" / "long.yaml")
    with pytest.raises(UserError, match="stage=long: .*stage/long.yaml .*the shipped one.*another name"):
        listed(tmp_path, conf)


def test_orders_of_several_lists():
    assert merged([["a", "b", "c"], ["b", "x", "c"]]) == ["a", "b", "x", "c"]
    assert merged([["b", "c"], ["a", "b", "c"], ["a", "b", "c"]]) == ["a", "b", "c"]
    assert merged([["x"], ["a", "b"]]) == ["x", "a", "b"] and merged([]) == []
