"""Loss on held-out data: against every example scored by itself, and without a trace in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from molmo2_nemo.data.config import SourceConfig
from tests.support.packs import demo_data, demo_packs, tiny_run, train_on_packs

EXAMPLES = 9


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    from data_prep.demo import build_demo

    folder = tmp_path_factory.mktemp("shards")
    build_demo(folder)
    return folder


def scored_alone(cfg, path: str, count: int) -> float:
    """The weighted mean loss of a fresh model over examples, each in a pack of its own."""
    import dataclasses

    from megatron.core import parallel_state

    from molmo2_nemo.data.collate import collate
    from molmo2_nemo.data.loader import ExampleReader, default_builder
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.inputs import PackInputs
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from tests.support.pool import start_megatron

    start_megatron()
    molmo2 = preset("tiny")
    model = Molmo2Model(molmo2, transformer_config(molmo2, use_cpu_initialization=True), seed=cfg.seed).eval()
    data = dataclasses.replace(cfg.data, sources={"held": SourceConfig(path=path)})
    builder, im_patch = default_builder(data)
    reader = ExampleReader(data, builder, im_patch)
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    total = weight = 0.0
    for n in range(count):
        example = reader[n]
        length = -(-example.num_tokens // 64) * 64
        inputs = PackInputs.from_batch(collate([[example]], sequence_length=length, im_patch_id=im_patch))
        total += float(model(inputs).detach())
        weight += float(example.loss_weights.clip(0).sum())
    return total / weight


def test_validation_scores_examples_and_leaves_training_alone(workers, shards, tmp_path):
    """A run whose rates are 0 keeps its first weights. Then one that learns, with and without, dropout on."""
    packs = demo_packs(20)
    still = tiny_run(tmp_path / "still", 1)
    still.data = demo_data(shards)
    still.validation.sources, still.validation.examples = {"held": SourceConfig(path=str(shards / "sft"))}, EXAMPLES
    for group in (still.stage.optim.vit, still.stage.optim.connector, still.stage.optim.llm):
        group.lr = 0.0
    workers.run(train_on_packs, still, packs, fit=True)
    (line,) = lines(tmp_path / "still")
    alone = workers.run(scored_alone, still, str(shards / "sft"), EXAMPLES)[0]
    assert line["losses"]["held"] == pytest.approx(alone, rel=1e-5)

    metrics = []
    for name in ("with", "without"):
        cfg = tiny_run(tmp_path / name, 3)
        cfg.data, cfg.stage.residual_dropout = demo_data(shards), 0.1
        if name == "with":
            cfg.validation = still.validation
            cfg.validation.every = 1
        metrics.append(workers.run(train_on_packs, cfg, packs, fit=True)[0])
    traced = [[(m["loss"], m["grad_norm_vit"], m["grad_norm_llm"]) for m in run] for run in metrics]
    assert traced[0] == traced[1]
    assert [line["step"] for line in lines(tmp_path / "with")] == [1, 2, 3]
    assert lines(tmp_path / "with")[2]["losses"]["held"] < line["losses"]["held"]
    assert not (tmp_path / "without" / "sft" / "validation.jsonl").exists()


def lines(folder: Path) -> list[dict]:
    return [json.loads(text) for text in (folder / "sft" / "validation.jsonl").read_text().splitlines()]
