"""Groups, schedule and clipping of the published recipe."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from molmo2_nemo import differences
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.settings.run import OPTIMIZER_GROUPS, OptimConfig, RunConfig
from molmo2_nemo.training.groups import LR_MULT, group_of, name_saved_groups
from molmo2_nemo.training.lr_schedule import lr_factor
from tests.support.packs import demo_packs, tiny_run, train_on_packs
from tests.support.thorough import thorough


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("vision.patch_embedding.weight", "vit"),
        ("module.module.vision.blocks.3.norm1.bias", "vit"),
        ("connector.pooling.q_proj.weight", "connector"),
        ("module.embedding.extra.weight", "connector"),
        ("embedding.base.weight", "llm"),
        ("output_layer.weight", "llm"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "llm"),
        ("decoder.final_layernorm.weight", "llm"),
    ],
)
def test_groups(name, group):
    assert group_of(name) == group
    assert group_of(name, adapters=True) == ("beside_adapters" if group == "llm" else group)


def test_adapters_stay_in_their_group():
    for name in ("decoder.layers.0.mlp.linear_fc1.lora_a", "module.decoder.layers.3.self_attention.linear_qkv.lora_b"):
        assert group_of(name) == group_of(name, adapters=True) == "llm"


def test_schedule_worked_examples():
    """Reference: stage 3's language model (peak 1e-5, 200 of 2000 steps) and the first update of stage 1's encoder."""
    for step, rate in ((100, 5e-6), (200, 1e-5), (1100, 5.5e-6), (2000, 1e-6), (5000, 1e-6)):
        assert 1e-5 * lr_factor(step, 200, 2000, 0.1) == pytest.approx(rate, rel=1e-12)
    assert 6e-6 * lr_factor(1, 2000, 32000, 0.1) == pytest.approx(3e-9)


def test_schedule_is_continuous():
    factors = [lr_factor(t, 7, 50, 0.1) for t in range(1, 60)]
    assert max(abs(a - b) for a, b in zip(factors, factors[1:], strict=False)) <= 1 / 7 + 1e-12
    assert factors[6] == 1.0 and factors[-1] == 0.1


def step_job(clip_grad: float, distributed: bool, adamw: str = "plain", size: float = 1e-2) -> dict:
    """One optimizer step of the real model with made-up gradients; what each group's norm was and became.

    Args:
        size: of every other parameter's gradients; a hundredth of it of the rest.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from molmo2_nemo.fused.choice import choose
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from molmo2_nemo.training.optimizer import adam_config, clipping_optimizer
    from tests.support.pool import start_megatron

    start_megatron()
    molmo2 = preset("tiny")
    config = transformer_config(molmo2, use_cpu_initialization=True)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    chunk = DistributedDataParallel(config, ddp, Molmo2Model(molmo2, config, seed=RunConfig.seed))
    optim, norms = OptimConfig(clip_grad=clip_grad), {}

    def skips(found: dict[str, float], rates: dict[str, float]) -> bool:
        norms.update(found)
        return False

    made = adam_config(optim, bf16=False, distributed=distributed)
    way = choose("adamw", adamw, "cpu", torch.float32).function
    optimizer = clipping_optimizer(made, [chunk], optim, skips, use_gloo_process_groups=True, adamw=way)
    generator = torch.Generator().manual_seed(0)
    squares = dict.fromkeys(OPTIMIZER_GROUPS, 0.0)
    for index, (name, parameter) in enumerate(chunk.named_parameters()):
        parameter.main_grad.copy_(
            torch.randn(parameter.shape, generator=generator) * (size / 100 if index % 2 else size)
        )
        squares[group_of(name)] += float(parameter.main_grad.double().square().sum())
    optimizer.step()
    clipped = {}
    for group in optimizer.param_groups:
        clipped[group["name"]] = math.sqrt(sum(float(p.grad.double().square().sum()) for p in group["params"]))
    return {
        "expected": {k: math.sqrt(v) for k, v in squares.items()},
        "norms": norms,
        "clipped": clipped,
        "rates": {g["name"]: g["lr"] for g in optimizer.param_groups},
        "decay": [g["weight_decay"] for g in optimizer.param_groups],
        "fused": {state.get("fused") for state in optimizer.param_groups},
        "weights": {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()},
    }


@pytest.mark.parametrize("distributed", [True, False])
def test_each_group_is_clipped_on_its_own(workers, distributed):
    got = workers.run(step_job, 1.0, distributed)[0]
    for group in OPTIMIZER_GROUPS:
        assert got["norms"][group] == pytest.approx(got["expected"][group], rel=1e-6)
        assert got["clipped"][group] == pytest.approx(min(1.0, got["expected"][group]), rel=1e-4)
    assert min(got["expected"].values()) > 0.5  # the norms differ, and at least one is clipped
    assert max(got["expected"].values()) > 1.0
    assert got["rates"] == {"vit": 5e-6, "connector": 5e-6, "llm": 1e-5}
    assert set(got["decay"]) == {0.0}


@pytest.mark.parametrize("distributed", [True, False])
def test_a_fused_step_is_the_plain_one(workers, distributed):
    plain, fused = (workers.run(step_job, 1.0, distributed, way)[0] for way in ("plain", "fused"))
    assert (plain["fused"], fused["fused"]) == ({None}, {True})
    for group in OPTIMIZER_GROUPS:
        assert fused["norms"][group] == pytest.approx(plain["norms"][group], rel=2e-7)
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(fused["weights"][name], weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1e-24, 1e20])
def test_norms_beyond_fp32_squares_are_found(workers, size):
    """Squares of these vanish or overflow in fp32; fused or not, the norm is the same finite number."""
    norms = [workers.run(step_job, 1.0, True, way, size)[0]["norms"] for way in ("plain", "fused")]
    assert norms[0] == norms[1]
    assert all(0 < norm < math.inf for norm in norms[0].values())


def test_saved_groups_are_known_by_name():
    """Older checkpoints have none; a newer one may have been written with the groups in another order."""
    older = [{"lr_mult": 3.0, "lr": 0.3}, {"pre_lr_mult": 1.0, "lr": 0.1}]
    newer = [{"name": "llm", "lr_mult": 1.0}, {"name": "connector", "lr_mult": 7.0}]
    name_saved_groups({"optimizer": {"param_groups": older}})
    name_saved_groups([{"param_groups": newer}])
    assert older == [{"name": "llm", "lr_mult": 3.0, "lr": 0.3}, {"name": "vit", "pre_lr_mult": 1.0, "lr": 0.1}]
    assert newer == [{"name": name, "lr_mult": LR_MULT[name]} for name in ("llm", "connector")]


def make_older(checkpoint: Path) -> None:
    """The optimizer's groups as they were saved before they had names, in another order; by a Megatron-core that kept
    them in common.pt."""
    common = checkpoint / "weights" / "common.pt"
    state = torch.load(common, weights_only=False) if common.exists() else differences.load_common_state(common.parent)
    for part in state["optimizer"]:
        groups = part.get("optimizer", part)["param_groups"]
        for group in groups:
            group["last_lr"] = group["lr"]
            del group["name"]
        groups.reverse()
    torch.save(state, common)
    checkpoint_manifest.write(
        checkpoint, checkpoint_manifest.describe(checkpoint, checkpoint_manifest.share(checkpoint, 0, 1))
    )


@pytest.mark.parametrize("distributed", [True, thorough(False)])
def test_a_checkpoint_without_group_names_resumes(workers, tmp_path, distributed):
    """Two steps, a checkpoint made older, one more step; against three in a row. Peaks and warm-ups differ by group."""
    packs, curves = demo_packs(12), []
    for folder, parts in (("whole", (3,)), ("parts", (2, 3))):
        cfg = tiny_run(tmp_path / folder, 3, distributed_optimizer=distributed)
        cfg.stage.optim.vit.lr, cfg.stage.optim.connector.warmup_steps = 3e-4, 1
        cfg.stage.optim.final_lr_fraction = 1.0  # else the schedule would depend on the number of steps
        for steps in parts:
            cfg.stage.max_steps = steps
            curves.append(workers.run(train_on_packs, cfg, packs, fit=True)[0])
            if steps == 2:
                make_older(tmp_path / folder / "sft" / "checkpoints" / "step=2")
    traced = [key for key in curves[0][0] if key.startswith(("loss", "grad_norm", "lr_"))]
    assert len(traced) == 7
    assert [[m[key] for key in traced] for m in curves[2]] == [[m[key] for key in traced] for m in curves[0]]


@pytest.mark.parametrize(
    ("distributed", "ways"),
    [
        (True, ("plain", "fused")),
        (False, ("fused", "plain")),
        thorough(True, ("fused", "plain")),
        thorough(False, ("plain", "fused")),
    ],
)
def test_a_checkpoint_of_one_adamw_resumes_with_the_other(workers, tmp_path, distributed, ways):
    """Two steps one way and two the other, against four of the first: equal to fp32 rounding, and counted alike."""
    packs, curves, states = demo_packs(12), [], []
    for folder, parts in (("whole", ((4, ways[0]),)), ("parts", ((2, ways[0]), (4, ways[1])))):
        cfg = tiny_run(tmp_path / folder, 4, distributed_optimizer=distributed)
        cfg.stage.optim.final_lr_fraction = 1.0  # else the schedule would depend on the number of steps
        for steps, cfg.kernels.adamw in parts:
            cfg.stage.max_steps = steps
            found, state = workers.run(train_and_look, cfg, packs, fit=True)[0]
            curves.append(found)
            states.append(state)
    whole, before, after = curves
    assert [m["loss"] for m in before] == [m["loss"] for m in whole[:2]]
    traced = [key for key in whole[0] if key.startswith(("loss", "grad_norm"))]
    for one, other in zip(whole, after, strict=True):
        assert [one[key] for key in traced] == pytest.approx([other[key] for key in traced], rel=3e-6)
    assert [state["steps"] for state in states] == [{4.0}, {2.0}, {4.0}]
    assert [state["fused"] for state in states] == [{way == "fused" or None} for way in (ways[0], *ways)]
    assert all(state["own"] for state in states)


def train_and_look(cfg: RunConfig, packs: list) -> tuple[list, dict]:
    """`train_on_packs`, and how the optimizer counted: the `step`s, whether each parameter has its own, and fused."""
    from molmo2_nemo.nemo import optimizer

    made, original = [], optimizer.clipping_optimizer

    def watched(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    optimizer.clipping_optimizer = watched
    try:
        metrics = train_on_packs(cfg, packs)
    finally:
        optimizer.clipping_optimizer = original
    inner = made[-1].chained_optimizers[0].optimizer
    steps = [state["step"] for state in inner.state.values()]
    return metrics, {
        "steps": {float(step) for step in steps},
        "own": len({step.data_ptr() for step in steps}) == len(steps) > 0,
        "fused": {group["fused"] for group in inner.param_groups},
    }


def test_a_count_of_steps_is_found_wherever_it_was_saved():
    """By PyTorch's AdamW: beside the states, or in every group (distributed). By FusedAdam: in groups that train."""
    from molmo2_nemo.training.optimizer import adapt_saved

    def saved() -> list[dict]:
        return [
            {"param_groups": [{"step": 9.0}, {}], "state": {"common_step": torch.tensor(3.0)}},  # the group's is older
            {"param_groups": [{"step": 3.0}, {"step": 3.0}]},
            {"param_groups": [{}, {"step": 3}]},
            {"param_groups": [{}, {"step": 3}], "state": {}},
        ]

    for state in saved():
        adapt_saved(state, torch_adamw=True)
        assert [group["step"] for group in state["param_groups"]] == [3.0, 3.0]
        assert "state" not in state or float(state["state"]["common_step"]) == 3.0
    for state in saved():
        adapt_saved(state, torch_adamw=False)
        assert [(type(group["step"]), group["step"]) for group in state["param_groups"]] == [(int, 3), (int, 3)]
        assert "common_step" not in state.get("state", {})
