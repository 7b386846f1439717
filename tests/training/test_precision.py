"""FP8: chosen, refused with a reason, and confined to the decoder's linear layers."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import itertools
import sys
from typing import Any

import pytest
import torch

from molmo2_nemo import compat
from molmo2_nemo.cost.hardware import DEVICES
from molmo2_nemo.errors import UserError
from molmo2_nemo.launch.out_of_memory import remedies
from molmo2_nemo.model.config import MemoryConfig, preset
from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.precision import fp8_problems, token_multiple
from molmo2_nemo.settings.run import ParallelConfig, RunConfig
from molmo2_nemo.training.precision import FP8, check_precision


def test_other_precisions_need_nothing():
    check_precision("fp32")
    check_precision("bf16")


def test_fp8_is_refused_with_what_is_missing(monkeypatch):
    """One after another: a GPU, a new one, Transformer Engine, a new one."""
    library: list[object] = []
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no GPU here; use cluster.precision=bf16"):
        check_precision("fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match="NVIDIA A100 has compute capability 8.0, not 9.0"):
        check_precision("fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: (library or [None])[0] if n == "transformer_engine" else find(n, *a)
    )
    with pytest.raises(UserError, match="Transformer Engine, which is not installed"):
        check_precision("fp8")
    library.append(importlib.machinery.ModuleSpec("transformer_engine", None))
    monkeypatch.setattr(compat, "installed", lambda name: "2.1.0+cu12")
    with pytest.raises(UserError, match="Transformer Engine 2.2 for current scaling, 2.1.0"):
        check_precision("fp8")
    monkeypatch.setattr(compat, "installed", lambda name: "2.8.0")
    check_precision("fp8")


def test_a_run_in_fp8_is_refused_before_anything_is_loaded(tmp_path):
    from molmo2_nemo.nemo.train import train

    cfg = RunConfig(output_dir=str(tmp_path / "run"))
    cfg.cluster.precision = "fp8"
    with pytest.raises(UserError, match="cluster.precision=fp8: needs a Hopper GPU"):
        train(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["4b", "8b", "o7b"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_published_models_and_packs_can_be_multiplied_in_fp8(name, tensor):
    lengths = {"data.packing.sequence_length": 16384}
    parallel = ParallelConfig(tensor=tensor, sequence=tensor > 1, context=2)
    assert not list(fp8_problems(preset(name), parallel, MemoryConfig(), lengths))


def test_sizes_that_fp8_cannot_multiply_are_refused_one_by_one():
    lengths = {"data.packing.sequence_length": 16400, "data.progression[0].sequence_length": 8200}
    found = list(fp8_problems(preset("4b"), ParallelConfig(context=8), MemoryConfig(), lengths))
    assert [line.split("=")[0] for line in found] == list(lengths)
    assert "for each of 8 ranks" in found[0] and "128; 16512 is" in found[0] and "128; 8320 is" in found[1]
    assert (token_multiple("fp8"), token_multiple("bf16")) == (16, 1)
    line = next(fp8_problems(preset("4b"), ParallelConfig(tensor=64), MemoryConfig(), {}))
    assert "feed-forward columns" in line and "64 tensor-parallel ranks" in line and "lower parallel.tensor" in line


def test_slices_of_an_mlp_are_refused_and_recomputation_is_not():
    """Also as one of a run's settings, so that advice about memory does not suggest it."""
    (line,) = fp8_problems(preset("4b"), ParallelConfig(), MemoryConfig(mlp_tiles=4), {})
    assert line.startswith("memory.mlp_tiles=4 with cluster.precision=fp8: ") and "use memory.mlp_tiles=1" in line
    cfg = compose(["recipe=4b", "cluster=gpu", "memory.recompute=full", "cluster.precision=fp8"])
    assert not any("fp8" in problem for problem in find_problems(cfg, files=False))
    assert "mlp_tiles" not in " ".join(remedies(cfg))
    cfg.memory.mlp_tiles = 2
    assert any(problem.startswith("memory.mlp_tiles=2") for problem in find_problems(cfg, files=False))
    cfg.cluster.precision = "bf16"
    assert not any("mlp_tiles" in problem for problem in find_problems(cfg, files=False))


def checkpoints_job() -> dict[tuple[str, bool], dict[str, Any]]:
    """Losses, gradients and forward calls of the attention kernel, by Megatron's checkpoints and, as Megatron takes for
    FP8, by one with the contract of Transformer Engine's: once without autograd, then in backward with it."""
    from megatron.core.enums import Fp8Recipe
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import transformer_block
    from torch.utils.checkpoint import checkpoint

    from tests.model.oracle import build, fixture_config, fixture_weights, micro_batches, run_schedule
    from tests.parallel.test_kept import watch
    from tests.support.pool import start_megatron

    taken = []

    def te_checkpoint(function: Any, distribute: bool, tracker: Any, group: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(distribute)
        return checkpoint(functools.partial(function, **kwargs), *args, use_reentrant=True)

    start_megatron()
    config = fixture_config("qwen3_tied")
    weights, calls, found = fixture_weights("qwen3_tied", config), watch("forward"), {}
    users = [module for name, module in sys.modules.items() if name.startswith("megatron.core")]
    kept = {module: module.te_checkpoint for module in users if hasattr(module, "te_checkpoint")}
    for module in (transformer_engine, transformer_block, *kept):
        module.te_checkpoint = te_checkpoint
    try:
        for recompute, fp8 in itertools.product(("full", "selective"), (False, True)):
            model = build(config, weights, MemoryConfig(recompute=recompute)).train()
            if fp8:
                model.config.fp8, model.config.fp8_recipe = FP8["fp8"], Fp8Recipe(FP8["fp8_recipe"])
            calls[0], taken[:] = 0, []
            losses = run_schedule(model, micro_batches("qwen3_tied", config), backward=True)
            grads = {n: p.main_grad.clone() for n, p in model.named_parameters()}
            found[recompute, fp8] = {"losses": losses, "grads": grads, "calls": calls[0], "checkpoints": len(taken)}
    finally:
        for module, own in kept.items():
            module.te_checkpoint = own
    return found


def test_recomputation_in_fp8_is_transformer_engines_and_attention_is_kept_there(workers):
    found = workers.run(checkpoints_job)[0]
    for recompute in ("full", "selective"):
        own, te = found[recompute, False], found[recompute, True]
        assert own["checkpoints"] == 0 < te["checkpoints"] == te["calls"] == own["calls"]
        assert all(map(torch.equal, own["losses"], te["losses"]))
        assert all(torch.equal(te["grads"][name], grad) for name, grad in own["grads"].items())


def test_megatron_takes_the_fields_and_parameters_stay_in_bf16():
    from megatron.core.enums import Fp8Recipe

    from molmo2_nemo.training.model import megatron_config

    config = megatron_config(preset("tiny"), MemoryConfig(), ParallelConfig(), precision="fp8", variable_length=False)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", Fp8Recipe.tensorwise, False)
    assert config.params_dtype == torch.bfloat16 and config.bf16
    other = megatron_config(preset("tiny"), MemoryConfig(), ParallelConfig(), precision="bf16", variable_length=False)
    assert not other.fp8 and other.params_dtype == torch.bfloat16


def test_nemo_hands_the_fields_to_the_model(monkeypatch):
    """NeMo overwrites fields of the model's config with those of its plugin for precision."""
    from molmo2_nemo.nemo import recipes

    cfg = compose(["recipe=4b", "cluster=gpu", "cluster.precision=fp8"])
    plugin = recipes.plugins(cfg, recipes.Machine())[0]
    assert {name: getattr(plugin, name) for name in FP8} == FP8
    assert plugin.params_dtype == torch.bfloat16 and plugin.grad_reduce_in_fp32
    assert recipes.model(cfg).optim.bf16
    cfg.parallel.grad_reduce = "bf16"
    assert not recipes.plugins(cfg, recipes.Machine())[0].grad_reduce_in_fp32


def test_only_the_decoder_has_linear_layers_that_fp8_changes(workers):
    """Vision encoder, connector and embedding are torch's own modules; the head is multiplied outside of one."""
    outside, inside = workers.run(linear_layers)[0]
    assert {"Linear", "ExtraRows", "VocabParallelEmbedding"} >= outside
    assert inside and all("ParallelLinear" in name for name in inside)


def linear_layers() -> tuple[set[str], set[str]]:
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from tests.support.pool import start_megatron

    start_megatron()
    molmo2 = preset("tiny")
    model = Molmo2Model(molmo2, transformer_config(molmo2, use_cpu_initialization=True), seed=0)
    kinds: tuple[set[str], set[str]] = (set(), set())
    for name, module in model.named_modules():
        if any(p.dim() == 2 for p in module.parameters(recurse=False)) and name != "vision":
            kinds[name.startswith("decoder.")].add(type(module).__name__)
    return kinds


def test_a_hopper_is_twice_as_fast_in_fp8_and_older_ones_have_none():
    for device in DEVICES.values():
        assert device.fp8_tflops is None or 1.9 < device.fp8_tflops / device.tflops < 2.1
    assert DEVICES["a100"].fp8_tflops is None and DEVICES["h100"].fp8_peak == 1979e12
