"""What NeMo's line changes in a recipe becomes a setting of ours or is refused by name; here without NeMo, on recipes
made by hand. tests/nemo/test_registration.py has NeMo's own."""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.launch import nemo_command
from molmo2_nemo.launch.nemo_command import changed, differences, known_settings, setting_of
from molmo2_nemo.settings.compose import compose, group_options, stages_of
from molmo2_nemo.settings.run import RunConfig, StageConfig
from molmo2_nemo.settings.schema import by_dotted_key, not_default, structure, to_dict


class Trainer:
    pass


class Strategy:
    pass


def recipe(cfg: RunConfig, **trainer) -> dict:
    """The shape of what NeMo-Run passes on."""
    strategy = functools.partial(Strategy, tensor_model_parallel_size=cfg.parallel.tensor)
    values = {"max_steps": cfg.stage.max_steps, "strategy": strategy, "callbacks": [functools.partial(Strategy)]}
    return {
        "trainer": functools.partial(Trainer, **(values | trainer)),
        "model": functools.partial(Strategy, dataclasses.replace(cfg.model), stage=dataclasses.replace(cfg.stage)),
        "log": None,
    }


@pytest.fixture
def cfg():
    return compose(["recipe=tiny", "stage=sft"])


def test_an_unchanged_recipe_has_no_differences(cfg):
    assert differences(recipe(cfg), recipe(cfg)) == {}
    assert changed(cfg, {}) == cfg


def test_the_schedule_moves_with_the_trainers_steps(cfg, capsys):
    found = differences(recipe(cfg, max_steps=5), recipe(cfg))
    assert found == {"trainer.max_steps": 5}
    assert changed(cfg, found) == compose(["recipe=tiny", "stage=sft", "stage.max_steps=5"])
    assert capsys.readouterr().err == "trainer.max_steps=5: taken as stage.max_steps=5\n"


@pytest.mark.parametrize(
    ("name", "value", "override"),
    [
        ("trainer.strategy.tensor_model_parallel_size", 1, "parallel.tensor=1"),
        ("trainer.num_nodes", 2, "cluster.nodes=2"),
        ("trainer.devices", "2", "cluster.devices=2"),
        ("data.global_batch_size", 16, "stage.global_batch_size=16"),
        ("model.optim.optim.llm.lr", 3e-6, "stage.optim.llm.lr=3e-6"),
        ("model.stage.train_vit", False, "stage.train_vit=false"),
        ("data.config.packing.max_crops", 8, "data.packing.max_crops=8"),
        ("model.model.attention", "blocks", "model.attention=blocks"),
        ("model.kernels.norm", "plain", "kernels.norm=plain"),
    ],
)
def test_names_of_nemo_and_ours(cfg, name, value, override):
    assert changed(cfg, {name: value}) == compose(["recipe=tiny", "stage=sft", override])


def test_what_is_inside_a_dataclass_or_a_list_is_found(cfg):
    other = recipe(cfg)
    other["model"].keywords["stage"].z_loss = 0.0
    other["trainer"].keywords["callbacks"].append(functools.partial(Trainer))
    found = differences(other, recipe(cfg))
    assert found["model.stage.z_loss"] == 0.0 and "trainer.callbacks.1" in found and len(found) == 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("trainer.max_time", "1:00", "trainer.max_time=1:00 is not taken from NeMo's line: write run.executor.time="),
        ("trainer.val_check_interval", 5, "write validation.every=500"),
        ("trainer.callbacks.0", None, "write log.*, validation.* or evaluation.* settings, of which the callbacks are"),
        ("peft", "lora", "peft=lora is not taken from NeMo's line: write stage.lora.rank=64 stage.lora.alpha=128"),
        ("peft", functools.partial(Strategy), "peft=Strategy is not taken"),
        ("tokenizer", "model", "write data.tokenizer=FOLDER"),
        ("resume.restore_config", "x", "write init_from=CHECKPOINT"),
        ("log.ckpt.save_every", 3, "write save_every=..."),
        ("trainer.max_step", 3, "did you mean 'trainer.max_steps'?"),
        ("model.stage.z_los", 3, "see docs/nemo.md"),
        ("trainer.callbacks.1", functools.partial(Strategy), "trainer.callbacks.1=Strategy is not taken"),
    ],
)
def test_the_rest_is_refused_with_what_does_it(cfg, name, value, said):
    with pytest.raises(UserError) as refused:
        changed(cfg, {name: value})
    assert said in str(refused.value)


def test_two_names_of_one_setting_and_a_wrong_type(cfg):
    with pytest.raises(UserError, match="are both stage.max_steps; leave one out"):
        changed(cfg, {"trainer.max_steps": 5, "model.optim.max_steps": 6})
    with pytest.raises(UserError, match="stage.max_steps is 'many'; expected a whole number"):
        changed(cfg, {"trainer.max_steps": "many"})


def test_every_name_stands_for_a_setting_that_there_is():
    for name, key in nemo_command.SETTINGS.items():
        assert key.rstrip(".") in known_settings(), name
    assert setting_of("model.stage.nothing") is None and setting_of("model.stage.optim.llm.lr") == "stage.optim.llm.lr"
    assert {f.name for f in dataclasses.fields(StageConfig)} <= {
        k.split(".")[1] for k in known_settings() if "stage." in k
    }


def test_settings_travel_without_their_defaults():
    """What NeMo-Run carries gives back every recipe's settings, and is much less."""
    for name in group_options("recipe"):
        for stage in stages_of([f"recipe={name}"]):
            cfg = compose([f"recipe={name}", f"stage={stage}"])
            carried = not_default(cfg)
            assert structure(RunConfig, carried) == cfg
            assert len(by_dotted_key(carried)) < len(by_dotted_key(to_dict(cfg)))


def test_a_recipe_for_slurm_is_not_started_here(monkeypatch, capsys, tmp_path):
    """In NeMo's command an error ends it with one line and the code of `molmo2 train`."""
    monkeypatch.chdir(tmp_path)
    cfg = compose(["recipe=8b", "stage=long", f"output_dir={tmp_path}"])
    monkeypatch.setattr(nemo_command, "built_recipe", lambda cfg: recipe(cfg))
    carried = not_default(cfg)
    with pytest.raises(SystemExit) as left:
        nemo_command.train(carried, str(tmp_path), data=None, **recipe(cfg))
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith(
        "molmo2: error: this recipe is for a Slurm cluster: submit it with "
    )
    with pytest.raises(SystemExit):
        nemo_command.train(carried, str(tmp_path), data=None, **recipe(cfg), peft="lora")
    assert "peft=lora is not taken from NeMo's line" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        nemo_command.train(carried, f"{tmp_path}/gone", data=None, **recipe(cfg))
    assert f"{tmp_path}/gone, where NeMo's command was typed and relative paths start" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value", "there"), [("num_nodes", 2, 1), ("devices", 8, 2)])
def test_a_job_has_the_size_that_its_executor_asked_for(monkeypatch, capsys, tmp_path, name, value, there):
    step = {"SLURM_STEP_ID": "0", "SLURM_NNODES": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for variable, text in step.items():
        monkeypatch.setenv(variable, text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nemo_command, "_leave", sys.exit)
    monkeypatch.setattr(nemo_command, "built_recipe", lambda cfg: recipe(cfg))
    ran = []
    monkeypatch.setattr("molmo2_nemo.launch.local.launch", lambda cfg: ran.append(cfg) or 130)
    cfg = compose(["recipe=tiny", "stage=sft", f"output_dir={tmp_path}"])
    carried = not_default(cfg)
    with pytest.raises(SystemExit, match="130"):
        nemo_command.train(carried, str(tmp_path), data=None, **recipe(cfg))
    assert (ran[0].cluster.nodes, ran[0].cluster.devices) == (1, 2)
    with pytest.raises(SystemExit, match="2"):
        nemo_command.train(carried, str(tmp_path), data=None, **recipe(cfg, **{name: value}))
    assert f"trainer.{name}={value}, but the job has {there}: leave it out" in capsys.readouterr().err
    assert len(ran) == 1
