"""What a run loads of NeMo: its trainer, and neither its models nor modelopt; and that training is the same without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.training.checkpoints import reading

SCRIPT = """
import json, os, sys
from molmo2_nemo import cpu
from molmo2_nemo.nemo.start import start_nemo
from molmo2_nemo.processes import quiet
from molmo2_nemo.rundir.lines import read_metrics
from molmo2_nemo.rundir.paths import stage_dir
from molmo2_nemo.settings.compose import compose

def heavy():
    return sorted(name for name in sys.modules if name in ("nemo.collections.llm", "modelopt", "datasets"))

def settings(name, steps):
    return compose(["recipe=tiny", "stage=sft", f"data.sources.demo.path={data}/sft", "parallel.tensor=1",
                    "parallel.sequence=false", "stage.global_batch_size=2", "save_every=2", f"output_dir={out}/{name}",
                    f"stage.max_steps={steps}"])

def numbers(cfg):
    keys = "step", "loss", "grad_norm_vit", "grad_norm_llm"
    return [[row[key] for key in keys] for row in read_metrics(stage_dir(cfg))]

def ours(steps):
    from molmo2_nemo.nemo.train import train
    train(cfg := settings("ours", steps))
    return {"numbers": numbers(cfg), "heavy": heavy()}

def theirs(steps):
    import fiddle
    from molmo2_nemo.nemo.recipes import stage_recipe
    recipe = stage_recipe(cfg := settings("theirs", steps))
    stage_dir(cfg).mkdir(parents=True)
    fiddle.build(recipe)()
    return {"numbers": numbers(cfg), "target": f"{recipe.__fn_or_cls__.__module__}.{recipe.__fn_or_cls__.__name__}"}

def more(steps):
    from nemo.collections.llm.modelopt.model_utils import set_modelopt_spec_if_exists_in_ckpt, save_modelopt_state
    import nemo.collections.llm.modelopt.model_utils as real
    return {"heavy": heavy(), "same": save_modelopt_state is real.save_modelopt_state, "file": real.__file__}

def apart(function, steps):  # every training is the first of its process
    if not (child := os.fork()):
        with open(f"{out}/{function.__name__}{steps}", "w") as file:
            json.dump(function(steps), file)
        os._exit(0)
    os.waitpid(child, 0)

data, out = sys.argv[1:]
quiet()
cpu.enable(threads=1)
start_nemo()
for function, steps in ((ours, 3), (ours, 4), (theirs, 3), (more, 0)):
    apart(function, steps)
"""


@pytest.fixture(scope="module")
def found(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("start")
    command = [sys.executable, "-c", SCRIPT, str(shards), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    names = "ours3", "ours4", "theirs3", "more0"
    assert all((out / name).exists() for name in names), done.stdout[-2000:] + done.stderr[-4000:]
    return {name: json.loads((out / name).read_text()) for name in names}


def test_a_run_loads_neither_all_models_nor_modelopt(found):
    """Steps, checkpoints and a resume included: NeMo's trainer would load both at the first checkpoint."""
    assert found["ours3"]["heavy"] == found["ours4"]["heavy"] == []
    assert [row[0] for row in found["ours4"]["numbers"]] == [1, 2, 3, 4]


def test_who_asks_for_more_of_modelopt_gets_it(found):
    more = found["more0"]
    assert {"nemo.collections.llm", "modelopt"} <= set(more["heavy"]) and more["same"]
    assert Path(more["file"]).name == "model_utils.py"


def test_training_equals_that_by_nemos_own_function(found):
    """With all models and modelopt loaded, bit by bit."""
    assert found["theirs3"]["target"] == "nemo.collections.llm.api.train"
    assert [row[0] for row in found["ours3"]["numbers"]] == [1, 2, 3]
    assert found["ours3"]["numbers"] == found["theirs3"]["numbers"]


@pytest.mark.parametrize("place", ["weights/modelopt_state", "modelopt_state"])
def test_a_checkpoint_that_modelopt_converted_is_refused(place, tmp_path):
    """NeMo's trainer would unpickle its state, and so run what somebody wrote into it."""
    (tmp_path / place).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"was converted by modelopt .*/{place}.*; name"), reading(tmp_path):
        raise AssertionError("it was read")
