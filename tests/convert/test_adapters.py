"""A stage with adapters by the real trainer: what moves, the same under another layout, merged by export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molmo2_nemo.convert import export_checkpoint, import_checkpoint
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.convert.names import canonical_shapes
from molmo2_nemo.model.config import LoraConfig, preset, with_options
from molmo2_nemo.rundir.summary import resolve_checkpoint
from molmo2_nemo.settings.schema import to_yaml
from tests.support.packs import demo_packs, tiny_run, train_on_packs

torch.set_num_threads(1)
LORA = LoraConfig(rank=4, alpha=8.0, targets=("linear_qkv", "linear_fc1", "linear_fc2"))


def checkpoint_of(cfg: Any) -> Path:
    return resolve_checkpoint(Path(cfg.output_dir) / cfg.stage.name)


def test_stage_with_adapters(workers: Any, tmp_path: Path) -> None:
    packs = demo_packs(4)
    first = tiny_run(tmp_path / "first", steps=1)
    workers.run(train_on_packs, first, packs, ranks=1, fit=True)
    runs = {}
    for name, ranks, layout in (("one", 1, {}), ("two", 2, {"tensor": 2, "sequence": True})):
        cfg = runs[name] = tiny_run(tmp_path / name, steps=2, **layout)
        cfg.init_from, cfg.stage.lora = str(checkpoint_of(first)), LORA
        cfg.stage.train_base_embedding, cfg.stage.train_vit = False, False
        metrics = workers.run(train_on_packs, cfg, packs, ranks=ranks, fit=True)[0]
        (Path(cfg.output_dir) / cfg.stage.name / "config.yaml").write_text(to_yaml(cfg))
        losses = [m["loss"] for m in metrics]
        if ranks == 1:
            expected = losses
    np.testing.assert_allclose(losses, expected, rtol=1e-5)

    before, after = MegatronCheckpoint(checkpoint_of(first)), MegatronCheckpoint(checkpoint_of(runs["two"]))
    shapes = canonical_shapes(with_options(preset("tiny"), lora=LORA))
    for key, shape in shapes.items():
        if "lora_" in key:
            assert after.read(key).any(), key
        else:
            moved = not torch.equal(before.read(key, shape[0]), after.read(key, shape[0]))
            if not key.endswith("k_proj.bias"):
                assert moved == key.startswith(("connector.", "embedding.extra")), key
    # export adds the adapters to their weights
    hf = export_checkpoint(checkpoint_of(runs["two"]), tmp_path / "hf", tokenizer="tiny")
    again = MegatronCheckpoint(import_checkpoint(hf, tmp_path / "again"))
    for key, shape in canonical_shapes(preset("tiny")).items():
        expected_weight = after.read(key, shape[0])
        if key.split(".")[-2] in LORA.targets:
            low, high = (after.read(key.replace("weight", part)) for part in ("lora_a", "lora_b"))
            expected_weight = expected_weight + LORA.alpha / LORA.rank * high @ low
        torch.testing.assert_close(again.read(key, shape[0]), expected_weight, rtol=0, atol=1e-7, msg=key)


def test_adapters_are_not_dropped_silently(workers: Any, tmp_path: Path) -> None:
    """A later stage without adapters must not start from a checkpoint that has some."""
    cfg = tiny_run(tmp_path / "run", steps=1)
    cfg.stage.lora = LORA
    workers.run(train_on_packs, cfg, demo_packs(4), ranks=1, fit=True)
    with pytest.raises(AssertionError, match="has adapters .* molmo2 convert export"):
        workers.run(refused, str(checkpoint_of(cfg)))


def refused(checkpoint: str) -> None:
    from molmo2_nemo.training.checkpoints import check_model

    check_model(Path(checkpoint), with_options(preset("tiny"), lora=LORA))  # the same adapters: fine
    check_model(Path(checkpoint), preset("tiny"))
