"""A start from a checkpoint that does not suit the run is refused, with everything else that is wrong."""

from __future__ import annotations

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.launch.local import launch
from molmo2_nemo.launch.start import finished_before, start_problems
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.summary import write_summary
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.schema import to_yaml


@pytest.fixture
def checkpoint(tmp_path):
    """Of the 8B model, in its run's folder."""
    path = tmp_path / "sft" / "checkpoints" / "step=9-last"
    (path / "weights").mkdir(parents=True)
    (tmp_path / "sft" / "config.yaml").write_text(to_yaml(compose(["recipe=8b", "stage=sft"])))
    return path


def of(checkpoint, *overrides):
    return compose(["recipe=tiny", "stage=sft", f"init_from='{checkpoint}'", *overrides])


def test_a_checkpoint_of_another_model(checkpoint):
    problems = list(start_problems(of(checkpoint)))
    assert len(problems) == 1 and "checkpoint of model '8b'" in problems[0]
    assert list(start_problems(of(checkpoint.parents[2]))) == []  # lies in no run
    assert list(start_problems(of(checkpoint.parent / "absent"))) == []  # settings/checks.py reports that


def test_damaged_settings_of_the_run(checkpoint):
    (checkpoint.parents[1] / "config.yaml").write_text("model: [")
    problems = list(start_problems(of(checkpoint)))
    assert (
        len(problems) == 1 and problems[0].startswith(f"init_from={checkpoint}: ") and "not valid YAML" in problems[0]
    )


def test_the_launcher_lists_it_with_the_rest(checkpoint, tmp_path):
    cfg = of(checkpoint, "data.sources.demo.path=/absent", f"output_dir='{tmp_path}/new'")
    with pytest.raises(UserError) as raised:
        launch(cfg)
    first, *listed = str(raised.value).split("\n  - ")
    assert first == "2 settings cannot work:" and "/absent" in listed[0] and "checkpoint of model '8b'" in listed[1]
    assert not (tmp_path / "new").exists()


def test_a_finished_stage_needs_no_processes(tmp_path):
    """Only where nothing can be left to do: not one step, and no score."""
    cfg = compose(["recipe=tiny", "stage=sft", f"output_dir={tmp_path}", "stage.max_steps=20"])
    checkpoint = tmp_path / "sft" / "checkpoints" / "step=20"
    checkpoint.mkdir(parents=True)
    assert finished_before(cfg) is None  # no summary
    (checkpoint / "weights").write_bytes(b"numbers")
    checkpoint_manifest.write(checkpoint, checkpoint_manifest.describe(checkpoint, [checkpoint / "weights"]))
    write_summary(tmp_path / "sft", {"steps": 20, "checkpoint": str(checkpoint)})
    done = finished_before(cfg)
    assert done is not None and (done["steps"], done["checkpoint"]) == (20, str(checkpoint))
    for more in (["stage.max_steps=21"], ["evaluation.tasks=[needle]"], ["validation.sources.held.path=shards"]):
        asked = ["recipe=tiny", "stage=sft", f"output_dir={tmp_path}", "stage.max_steps=20", *more]
        assert finished_before(compose(asked)) is None, more
    (checkpoint / "weights").write_bytes(b"num")
    assert finished_before(cfg) is None  # damaged: training has to fall back to the one before
