"""What trains: the real trainer over a few steps, its final checkpoint compared bit by bit with the fresh model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.packs import demo_packs, tiny_run, train_on_packs
from tests.support.pool import start_megatron

torch.set_num_threads(1)
BASE = "embedding.base.weight"


@pytest.fixture(scope="module")
def packs():
    return demo_packs(4)


def fresh_job(seed: int) -> dict[str, torch.Tensor]:
    """The tiny model before its first step."""
    from molmo2_nemo.model.config import preset
    from tests.model.oracle import build

    start_megatron()
    return {n: p.detach() for n, p in build(preset("tiny"), seed=seed).named_parameters()}


def train_job(cfg: Any, packs: Any) -> dict[str, str]:
    """Train; the optimizer group of every parameter of this rank that an optimizer holds, by its name in the model."""
    from molmo2_nemo.model.init import canonical_name
    from molmo2_nemo.nemo import optimizer

    held: dict[str, str] = {}
    original = optimizer.Molmo2Optimizer.optimizers

    def watched(self: Any, model: Any) -> Any:
        made = original(self, model)
        stage = model[0].module
        while "decoder" not in stage._modules:  # wrappers answer for what they wrap
            stage = stage.module
        names = {p: canonical_name(stage, n) for n, p in stage.named_parameters()}
        for inner in made[0].mcore_optimizer.chained_optimizers:
            for parameter, (group, _) in inner.model_param_group_index_map.items():
                held[names.pop(parameter)] = inner.param_groups[group]["name"]
        return made

    optimizer.Molmo2Optimizer.optimizers = watched
    try:
        train_on_packs(cfg, packs)
    finally:
        optimizer.Molmo2Optimizer.optimizers = original
    return held


def group_of(name: str) -> str:
    """The rule of the published recipe: vision encoder; connector and the extra rows; everything else."""
    if name.startswith("vision."):
        return "vit"
    return "connector" if name.startswith("connector.") or name == "embedding.extra.weight" else "llm"


CASES = {  # what a run sets: which parameters must not move
    "default PP2": ({}, {"pipeline": 2}, lambda n: n == BASE),
    "default TP2": ({}, {"tensor": 2, "sequence": True}, lambda n: n == BASE),
    "base rows too, PP2": ({"train_base_embedding": True}, {"pipeline": 2}, lambda n: False),
    "no vit": ({"train_vit": False}, {}, lambda n: n == BASE or group_of(n) == "vit"),
    # the last stage has nothing that trains
    "connector only, PP2": (
        {"train_vit": False, "train_llm": False},
        {"pipeline": 2},
        lambda n: group_of(n) != "connector",
    ),
    "no vision, CP2": (
        {"train_vit": False, "train_connector": False},
        {"context": 2},
        lambda n: n == BASE or group_of(n) != "llm",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_trains(workers, packs, tmp_path, case):
    from molmo2_nemo.convert.megatron_io import MegatronCheckpoint

    choices, layout, frozen = CASES[case]
    cfg = tiny_run(tmp_path, 2, **layout)
    cfg.stage.global_batch_size, cfg.stage.optim.weight_decay = 2, 0.1  # decay moves whatever an optimizer holds
    cfg.stage.train_base_embedding = False
    for group in (cfg.stage.optim.vit, cfg.stage.optim.connector, cfg.stage.optim.llm):
        group.warmup_steps = 1
    for name, value in choices.items():
        setattr(cfg.stage, name, value)
    before = workers.run(fresh_job, cfg.seed)[0]
    ranks = 2 if layout else 1
    held = workers.run(train_job, cfg, packs, ranks=ranks, fit=True)
    checkpoint = MegatronCheckpoint(next((tmp_path / cfg.stage.name / "checkpoints").glob("step=*")))
    for name, start in before.items():
        moved = not torch.equal(checkpoint.read(name, start.shape[0]), start)
        if name.endswith("k_proj.bias") and not moved:
            continue  # softmax does not see a shift of the keys: all they get is rounding noise
        assert moved != frozen(name), f"{name} {'moved' if moved else 'did not move'}"
    groups = {name: group for rank in held for name, group in rank.items()}
    assert groups == {name: group_of(name) for name in before if not frozen(name)}


def test_resume_where_a_pipeline_stage_trains_nothing(workers, packs, tmp_path):
    """Two steps, a checkpoint, one more step; against three in a row."""
    curves = []
    for folder, parts in (("whole", (3,)), ("parts", (2, 3))):
        cfg = tiny_run(tmp_path / folder, 3, pipeline=2)
        cfg.stage.global_batch_size, cfg.stage.train_vit, cfg.stage.train_llm = 2, False, False
        cfg.stage.train_base_embedding = False
        cfg.stage.optim.final_lr_fraction = 1.0  # else the schedule would depend on the number of steps
        for steps in parts:
            cfg.stage.max_steps = steps
            curves.append(workers.run(train_on_packs, cfg, packs, ranks=2, fit=True)[0])
    assert [m["step"] for m in curves[2]] == [1, 2, 3]
    assert [m["loss"] for m in curves[2]] == [m["loss"] for m in curves[0]]


def test_published_stages_freeze_the_base_rows_only():
    from molmo2_nemo.settings.run import StageConfig

    stage = StageConfig()
    assert (stage.train_vit, stage.train_connector, stage.train_llm) == (True, True, True)
    assert stage.train_base_embedding is False
