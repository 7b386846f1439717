"""Packs that grow within a stage, through the trainer: pipeline stages must learn each micro-batch's length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from molmo2_nemo.data.config import PhaseConfig
from molmo2_nemo.data.example import PAD_EXAMPLE, PAD_TOKEN, ROOT_BRANCH, Batch
from tests.support.packs import demo_packs, tiny_run, train_on_packs

SHORT, LONG = 768, 1024
PADDING = {"input_ids": PAD_TOKEN, "labels": PAD_TOKEN, "loss_weights": 0, "position_ids": 0, "visual": False}


def longer(batch: Batch) -> Batch:
    """The same pack in more token slots."""
    fill = PADDING | {"example_ids": PAD_EXAMPLE, "branch_ids": ROOT_BRANCH}
    room = [(0, 0), (0, LONG - SHORT)]
    return replace(batch, **{name: np.pad(getattr(batch, name), room, constant_values=v) for name, v in fill.items()})


def growing_run(folder, **layout):
    cfg = tiny_run(folder, 3, **layout)
    cfg.data.packing.sequence_length = LONG
    cfg.data.progression = [PhaseConfig(1, SHORT)]
    return cfg


def test_a_pipeline_follows_one_process_when_packs_grow(workers, tmp_path):
    packs = demo_packs(20)[:12]
    grown = packs[:4] + [longer(batch) for batch in packs[4:]]
    single = workers.run(train_on_packs, growing_run(tmp_path / "one"), grown, fit=True)[0]
    pipeline = growing_run(tmp_path / "pp", pipeline=2)
    got = workers.run(train_on_packs, pipeline, grown, ranks=2, fit=True)[0]
    assert [m["padded_tokens"] for m in got] == [4 * SHORT, 4 * LONG, 4 * LONG]
    for name in ("loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm"):
        np.testing.assert_allclose([m[name] for m in got], [m[name] for m in single], rtol=1e-5, err_msg=name)


def test_the_rotary_factor_follows_the_phase(workers, tmp_path):
    """The first step is that of a run with the phase's factor; the second is not, nor is the first that of the last."""

    def losses(name, factor, *phases):
        cfg = tiny_run(tmp_path / name, 2)
        cfg.model.rope_scaling, cfg.model.rope_factor = "yarn", factor
        cfg.data.progression = [PhaseConfig(1, SHORT, rope_factor=phase) for phase in phases]
        return [m["loss"] for m in workers.run(train_on_packs, cfg, demo_packs(20)[:8], fit=True)[0]]

    following, low, high = losses("following", 8.0, 2.0), losses("low", 2.0), losses("high", 8.0)
    assert following[0] == low[0] != high[0]
    assert following[1] not in (low[1], high[1])
