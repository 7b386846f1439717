"""One loss curve, whatever the layout: the real trainer on the same real packs, five optimizer steps in fp32."""

from __future__ import annotations

import json

import numpy as np
import pytest

from molmo2_nemo.data.config import SourceConfig
from tests.support.packs import demo_data, demo_packs, text_only, tiny_run, train_on_packs, weighing
from tests.support.thorough import thorough

TRACED = ("loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm")


@pytest.fixture(scope="module")
def ordinary():
    return demo_packs(20)


@pytest.fixture(scope="module")
def packs(ordinary):
    """Four for each step. Loss weights of the second step sum to less than 1, those of the last to nothing."""
    return [*ordinary[:4], *weighing(ordinary[4:8], 0.25), *ordinary[8:16], *weighing(ordinary[16:], 0)]


CHUNKS = {"recompute": "full", "sequence_chunk": 100}


def validated_run(folder, shards, **layout):
    """Also scores seven examples of two held-out data sets after the last step."""
    cfg = tiny_run(folder, **layout)
    cfg.data = demo_data(shards)
    cfg.validation.sources = {name: SourceConfig(path=str(shards / name)) for name in ("sft", "pretrain")}
    cfg.validation.examples = 7
    return cfg


def validation(folder):
    (line,) = (json.loads(text) for text in (folder / "sft" / "validation.jsonl").read_text().splitlines())
    assert line["step"] == 5 and line["skipped"] == 0 and sorted(line["losses"]) == ["pretrain", "sft"]
    assert [line["counts"][name]["examples"] for name in ("pretrain", "sft")] == [{"count": 7}] * 2
    return [line["losses"][name] for name in ("pretrain", "sft")]


@pytest.fixture(scope="module")
def single(workers, packs, shards, tmp_path_factory):
    """The metrics of one process, and its losses on held-out data."""
    folder = tmp_path_factory.mktemp("one")
    metrics = workers.run(train_on_packs, validated_run(folder, shards), packs, ranks=1, fit=True)[0]
    return metrics, validation(folder)


def test_packs_mix_everything(packs):
    """What the layouts are compared on: text-only packs and examples, pictures, several pictures, video, trees."""
    assert any(len(b.crops) == 0 for b in packs) or any(
        not b.visual[b.example_ids == e].any() for b in packs for e in range(b.example_ids.max() + 1)
    )
    assert any((b.branch_ids >= 0).any() for b in packs)
    assert {4, 9} <= {int((row >= 0).sum()) for b in packs for row in b.pooling}  # 2 x 2 pictures and 3 x 3 video
    assert max(len(b.unit_crops) for b in packs) > 8


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        thorough(2, {"data": 2}),
        thorough(2, {"tensor": 2}),
        thorough(2, {"tensor": 2, "sequence": True}),
        thorough(2, {"pipeline": 2}),
        (4, {"tensor": 2, "sequence": True, "context": 2}),
        thorough(4, {"context": 4}),
        (
            4,
            {
                "context": 4,
                "context_ulysses": 2,
                "ring_balance": "cost",
                "cut_padding": True,
                "memory": {"recompute": "full", "vision_chunk": 3},
            },
        ),
        thorough(4, {"tensor": 2, "context": 2, "context_ulysses": 1}),
        (2, {"context": 2, "context_ulysses": 1, "ring_balance": "cost", "memory": CHUNKS}),
        (4, {"pipeline": 2, "context": 2, "context_ulysses": 1, "cp_comm_type": "all_gather"}),
        (2, {"data": 2, "distributed_optimizer": False}),
    ],
    ids=lambda x: "+".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else f"{x} processes",
)
def test_layout_follows_the_single_process(workers, packs, shards, single, tmp_path, ranks, layout):
    single, held_out = single
    got = workers.run(train_on_packs, validated_run(tmp_path, shards, **layout), packs, ranks=ranks, fit=True)[0]
    assert [m["step"] for m in got] == [1, 2, 3, 4, 5]
    for name in TRACED:
        np.testing.assert_allclose([m[name] for m in got], [m[name] for m in single], rtol=1e-5, err_msg=name)
    assert got[3]["loss"] < got[0]["loss"]
    np.testing.assert_allclose(validation(tmp_path), held_out, rtol=1e-5)
    for one, other in zip(got, single, strict=True):  # counted once, whoever shares the work; by mask area
        for name in ("tokens", "crops", "fill", "crop_fill"):
            assert one[name] == other[name], name
        work, all_work = (m["tflops"] * m["seconds"] * n for m, n in ((one, ranks), (other, 1)))
        assert work == pytest.approx(all_work, rel=1e-9)
        assert one["tasks"] == pytest.approx(other["tasks"], rel=1e-5)


def test_a_ring_is_balanced_from_any_attempt_on(workers, packs, tmp_path):
    """Two steps with runs of consecutive tokens and three with balanced ones, against five of the latter."""
    curves = []
    for folder, parts in (("whole", ((5, "cost"),)), ("parts", ((2, "none"), (5, "cost")))):
        cfg = tiny_run(tmp_path / folder, context=2, context_ulysses=1)
        cfg.stage.optim.final_lr_fraction = 1.0  # else the schedule would depend on the number of steps
        for cfg.stage.max_steps, cfg.parallel.ring_balance in parts:
            curves.append(workers.run(train_on_packs, cfg, packs, ranks=2, fit=True)[0])
    whole, _, resumed = curves
    assert [m["step"] for m in resumed] == [1, 2, 3, 4, 5]
    for name in TRACED:
        np.testing.assert_allclose([m[name] for m in resumed], [m[name] for m in whole], rtol=1e-5, err_msg=name)


def test_only_proportions_of_loss_weights_count(workers, ordinary, single, tmp_path):
    """Oracle for the layouts above: a step whose weights sum to 0.25 is the step of the same packs with weights whose
    sum is far above 1. Nothing to learn from is no gradient, and no fault."""
    assert sum(batch.loss_weights.sum() for batch in ordinary[4:8]) > 4
    expected = workers.run(train_on_packs, tiny_run(tmp_path), ordinary, ranks=1, fit=True)[0]
    for name in TRACED:
        np.testing.assert_allclose([m[name] for m in single[0][:4]], [m[name] for m in expected[:4]], rtol=1e-5)
    nothing = single[0][4]
    assert [nothing[name] for name in TRACED] == [0, 0, 0, 0] and nothing["skipped_steps"] == 0


@pytest.mark.parametrize(
    "layout", [thorough({"tensor": 2, "sequence": True}), {"context": 2, "context_ulysses": 1}], ids=str
)
def test_bfloat16_follows_fp32(workers, packs, single, tmp_path, layout):
    """Mixed precision as on GPU: bf16 parameters, fp32 master weights and gradient sums. Three steps, the last of which
    sees both updates of the warm-up: a CPU takes five times as long in bf16."""
    cfg = tiny_run(tmp_path, 3, **layout)
    cfg.cluster.precision = "bf16"
    got = workers.run(train_on_packs, cfg, packs, ranks=2, fit=True)[0]
    np.testing.assert_allclose([m["loss"] for m in got], [m["loss"] for m in single[0][:3]], rtol=2e-2)


def test_text_only_micro_batch_beside_one_with_pictures(workers, packs, tmp_path):
    """Under DP2 one rank has no crop at all while the other has some; under CP2 whole micro-batches have none."""
    text, pictures = text_only(packs[0]), next(b for b in packs if len(b.crops))
    mixed = [text, pictures] * 10
    single = workers.run(train_on_packs, tiny_run(tmp_path / "one", 2), mixed, ranks=1, fit=True)[0]
    for name, layout in (("dp", {"data": 2}), ("cp", {"context": 2})):
        got = workers.run(train_on_packs, tiny_run(tmp_path / name, 2, **layout), mixed, ranks=2, fit=True)[0]
        for traced in TRACED:
            np.testing.assert_allclose([m[traced] for m in got], [m[traced] for m in single], rtol=1e-5)


def test_text_without_a_picture_trains_with_an_encoder_that_is_trained(workers, packs, tmp_path):
    """Nothing reaches the encoder in the whole run: its gradient is 0 under every layout, and the rest learns alike."""
    text = [text_only(batch) for batch in packs[:8]]
    single = workers.run(train_on_packs, tiny_run(tmp_path / "one", 2), text, ranks=1, fit=True)[0]
    assert [m["grad_norm_vit"] for m in single] == [0, 0] and single[1]["grad_norm_llm"] > 0
    for name, layout in (("dp", {"data": 2}), ("cp", {"context": 2}), ("pp", {"pipeline": 2})):
        got = workers.run(train_on_packs, tiny_run(tmp_path / name, 2, **layout), text, ranks=2, fit=True)[0]
        for traced in TRACED:
            np.testing.assert_allclose([m[traced] for m in got], [m[traced] for m in single], rtol=1e-5)


def train_three_layers(cfg, packs):
    """The tiny model with one more layer in its decoder, so that three pipeline stages have one each."""
    from dataclasses import replace

    from molmo2_nemo.model import config

    tiny = config.PRESETS["tiny"]
    deeper = replace(tiny(), text=replace(tiny().text, num_layers=3))
    config.PRESETS["tiny"] = lambda: deeper
    try:
        return train_on_packs(cfg, packs)
    finally:
        config.PRESETS["tiny"] = tiny


def test_a_pipeline_stage_between_the_first_and_the_last(workers, packs, tmp_path):
    """It has neither the embedding with the encoder nor the loss, and both its neighbours are other ranks."""
    single = workers.run(train_three_layers, tiny_run(tmp_path / "one", 3), packs, ranks=1, fit=True)[0]
    got = workers.run(train_three_layers, tiny_run(tmp_path / "pp3", 3, pipeline=3), packs, ranks=3, fit=True)[0]
    for traced in TRACED:
        np.testing.assert_allclose([m[traced] for m in got], [m[traced] for m in single], rtol=1e-5, err_msg=traced)
