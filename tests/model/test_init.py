"""Fresh weights: drawn once, by name; and what a checkpoint is to bring is left to it, and missed where it does not."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import LoraConfig, Molmo2Config, preset, with_options


def odd_model() -> Molmo2Config:
    """Tiny, with adapters, a head of its own and a vocabulary that two ranks cannot halve."""
    model = with_options(preset("tiny"), lora=LoraConfig(rank=4))
    return replace(model, text=replace(model.text, vocab_size=1023, tie_embeddings=False))


@contextlib.contextmanager
def memory_of_nan() -> Iterator[None]:
    """Inside the block memory that nobody filled holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def built(loaded: str) -> dict[str, torch.Tensor]:
    """Job: parameters of this rank's part, in memory that was NaN."""
    from molmo2_nemo.model.config import MemoryConfig
    from molmo2_nemo.settings.run import ParallelConfig, StageConfig
    from molmo2_nemo.training.model import build_model, megatron_config
    from tests.support.pool import start_megatron

    size = torch.distributed.get_world_size()
    start_megatron(tensor=size)
    model, parallel = odd_model(), ParallelConfig(tensor=size)
    stage, memory = StageConfig(lora=model.lora), MemoryConfig()
    config = megatron_config(model, memory, parallel, precision="fp32", variable_length=False)
    config.tensor_model_parallel_size = size
    with memory_of_nan():
        part = build_model(
            model,
            config,
            stage=stage,
            memory=memory,
            parallel=parallel,
            seed=11,
            loaded=loaded,  # type: ignore
        )
    return {name: p.detach().clone() for name, p in part.named_parameters()}


def drawn(name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """What a weight is to be, written out."""
    digest = hashlib.sha256(f"11:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


@pytest.fixture(scope="module")
def fresh(workers):
    return workers.run(built, "nothing", ranks=2)


def test_every_parameter_is_drawn(fresh):
    model = odd_model()
    for part in fresh:
        assert not [name for name, p in part.items() if not p.isfinite().all()]
    first, second = fresh
    width, std = model.text.hidden_size, model.text.initializer_range
    for name in ("embedding.base.weight", "output_layer.weight"):
        whole = torch.cat((first[name], second[name]))
        assert torch.equal(whole[:1023], drawn(name, (1023, width), std)) and not whole[1023:].any()
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    whole = torch.cat((first[name], second[name]), dim=1)
    assert torch.equal(whole, drawn(name, tuple(whole.shape), std))
    name = "vision.blocks.0.mlp.fc1.weight"
    expected = drawn(name, tuple(first[name].shape), model.vision.initializer_range)
    assert torch.equal(first[name], expected) and torch.equal(second[name], expected)
    assert not first["vision.blocks.0.mlp.fc1.bias"].any()


@pytest.mark.parametrize("loaded", ["all", "all but adapters"])
def test_what_a_checkpoint_brings_is_not_drawn(workers, fresh, loaded):
    from molmo2_nemo.training.faults import refuse_infinite

    for part, complete in zip(workers.run(built, loaded, ranks=2), fresh, strict=True):
        adapters = {name for name in part if "lora_" in name}
        assert adapters and set(part) == set(complete)
        for name, p in part.items():
            if name in adapters and loaded == "all but adapters":
                assert torch.equal(p, complete[name])
            elif name in ("embedding.base.weight", "output_layer.weight"):
                real = complete[name].any(1)  # padding rows are in no checkpoint
                assert p[real].isnan().all() and not p[~real].any()
            else:
                assert p.isnan().all()
        # a checkpoint that brings all but one
        missed = "decoder.layers.0.self_attention.linear_qkv.weight"
        brought = [(name, part[name] if name == missed else complete[name]) for name in part]
        with pytest.raises(UserError, match=f"{missed} is not finite.*the checkpoint did not bring it"):
            refuse_infinite(brought)
    padded = [(~part["output_layer.weight"].any(1)).sum() for part in fresh]
    assert math.isclose(sum(padded), 1)


def counted(settings: list[str]) -> tuple[list[float], list[str]]:
    """Job: losses of a run of the tiny model, and the names of the parameters that it drew."""
    from molmo2_nemo.model import init
    from molmo2_nemo.nemo.train import train
    from molmo2_nemo.rundir.lines import read_metrics
    from molmo2_nemo.rundir.paths import stage_dir
    from molmo2_nemo.settings.compose import compose

    names, original = [], init.fresh

    def watched(name, *rest):
        names.append(name)
        return original(name, *rest)

    init.fresh = watched
    cfg = compose(settings)
    try:
        train(cfg)
    finally:
        init.fresh = original
    return [line["loss"] for line in read_metrics(stage_dir(cfg))], names


def test_a_run_draws_only_what_no_checkpoint_brings(workers, shards, tmp_path):
    common = ["recipe=tiny", "stage=sft", "parallel=single", f"data.sources.demo.path={shards}/sft", "save_every=2"]
    common += ["stage.global_batch_size=1", "stage.micro_batch_size=1", "stage.optim.llm.warmup_steps=0"]

    def run(folder: str, steps: int, *more: str) -> tuple[list[float], list[str]]:
        words = [*common, f"output_dir={tmp_path / folder}", f"stage.max_steps={steps}", *more]
        return workers.run(counted, words, ranks=1, fit=True)[0]

    _, names = run("first", 2)
    assert {"vision.blocks.0.mlp.fc1.weight", "decoder.final_layernorm.weight"} <= set(names)
    assert len(names) == len(set(names))
    losses, names = run("first", 3)
    assert len(losses) == 3 and not names  # resumed
    start = f"init_from={tmp_path / 'first' / 'sft' / 'checkpoints' / 'step=2'}"
    losses, names = run("second", 2, start)
    assert all(map(math.isfinite, losses)) and not names
    losses, names = run("third", 2, start, "stage.lora.rank=2")
    assert all(map(math.isfinite, losses)) and names and all("lora_" in name for name in names)
