"""Parameters sharded by Megatron-FSDP (`parallel.fsdp=megatron`): the numbers are those of whole parameters, and a
checkpoint of either goes on as the other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from molmo2_nemo.cli.main import main
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import LoraConfig
from molmo2_nemo.settings.run import RunConfig
from tests.support.packs import demo_packs, text_only, tiny_run, train_on_packs
from tests.support.thorough import thorough

SECONDS = 600.0


def curve(metrics: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Loss, norms and rates of all steps."""
    traced = [key for key in metrics[0] if key.startswith(("loss", "grad_norm", "lr_"))]
    assert len(traced) >= 5
    return {key: [step[key] for step in metrics] for key in traced}


def same(got: dict[str, list[float]], expected: dict[str, list[float]], **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for key in got:
        np.testing.assert_allclose(got[key], expected[key], err_msg=key, **(tolerance or {"rtol": 1e-6}))


def uneven() -> list[Any]:
    """On two replicas one rank has no crop while the other has some."""
    packs = demo_packs(20)
    return [text_only(packs[0]), next(b for b in packs if len(b.crops))] * 4


def train_lora(cfg: RunConfig) -> None:
    cfg.stage.lora, cfg.stage.train_base_embedding = LoraConfig(rank=4, alpha=8.0, norms=True), False


def train_connector(cfg: RunConfig) -> None:
    cfg.stage.train_vit = cfg.stage.train_llm = cfg.stage.train_base_embedding = False


def freeze_encoder(cfg: RunConfig) -> None:
    cfg.stage.train_vit = False


def in_bf16(cfg: RunConfig) -> None:
    cfg.cluster.precision = "bf16"


RECOMPUTED = {"recompute": "full", "vision_chunk": 3}


@pytest.mark.parametrize(
    ("ranks", "layout", "change"),
    [
        thorough(2, {"data": 2}, None),
        (2, {"data": 2, "memory": RECOMPUTED}, None),
        (2, {"data": 2, "memory": {"mlp_tiles": 3}}, freeze_encoder),
        thorough(2, {"context": 2}, None),
        (4, {"context": 2, "context_ulysses": 1, "ring_balance": "cost", "cut_padding": True, "data": 2}, None),
        (2, {"data": 2}, train_lora),
        thorough(2, {"data": 2}, train_connector),
        thorough(2, {"data": 2}, in_bf16),
    ],
    ids=["data", "recomputed", "tiles, frozen encoder", "context", "ring", "adapters", "connector alone", "bf16"],
)
def test_numbers_are_those_of_whole_parameters(workers, tmp_path, ranks, layout, change):
    curves = []
    for fsdp in ("none", "megatron"):
        cfg = tiny_run(tmp_path / fsdp, 2, fsdp=fsdp, **layout)
        if change is not None:
            change(cfg)
        metrics = workers.run(train_on_packs, cfg, uneven(), ranks=ranks, fit=True, seconds=SECONDS)[0]
        curves.append(curve(metrics))
    same(curves[1], curves[0], rtol=2e-3 if change is in_bf16 else 1e-6)


def attempt(workers: Any, cfg: RunConfig, steps: int, fsdp: str, ranks: int) -> dict[str, list[float]]:
    cfg.stage.max_steps, cfg.parallel.fsdp, cfg.parallel.data = steps, fsdp, ranks
    return curve(workers.run(train_on_packs, cfg, demo_packs(20), ranks=ranks, fit=True, seconds=SECONDS)[0])


def run_in(folder: Path, precision: str = "fp32") -> RunConfig:
    cfg = tiny_run(folder, 1)
    cfg.stage.optim.final_lr_fraction = 1.0  # else the schedule would depend on the number of steps
    cfg.stage.optim.clip_grad, cfg.cluster.precision = 0.3, precision
    return cfg


def test_a_checkpoint_goes_on_sharded_and_whole(workers, tmp_path):
    """Sharded, then whole, then sharded again, against whole parameters throughout; and on another number of ranks."""
    whole = attempt(workers, run_in(tmp_path / "whole"), 3, "none", 2)
    cfg = run_in(tmp_path / "mixed")
    for steps, fsdp in ((1, "megatron"), (2, "none"), (3, "megatron")):
        got = attempt(workers, cfg, steps, fsdp, 2)
    same(got, whole)
    shutil.copytree(tmp_path / "mixed", tmp_path / "copy")
    other = run_in(tmp_path / "copy")
    same(attempt(workers, cfg, 4, "megatron", 4), attempt(workers, other, 4, "none", 4))


def test_bf16_keeps_its_master_weights(workers, tmp_path):
    """What goes on is what would have gone on: fp32 copies and moments come back, not the parameters rounded."""
    through = attempt(workers, run_in(tmp_path / "through", "bf16"), 3, "megatron", 2)
    cfg = run_in(tmp_path / "parts", "bf16")
    for steps in (2, 3):
        got = attempt(workers, cfg, steps, "megatron", 2)
    same(got, through, rtol=0)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = FileSystemReader(checkpoint / "weights")
    found = reader.read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in found.items() if hasattr(m, "size")}
    load(state, storage_reader=reader, no_dist=True)
    return state


def test_what_is_written_is_the_whole_model(workers, tmp_path):
    """Every tensor of a sharded run's checkpoint, moments too, is that of a run with whole parameters; an export reads
    it."""
    folders = []
    for fsdp in ("none", "megatron"):
        attempt(workers, run_in(tmp_path / fsdp), 1, fsdp, 2)
        folders.append(tmp_path / fsdp / "sft" / "checkpoints" / "step=1")
    whole, sharded = map(tensors, folders)
    assert whole.keys() == sharded.keys() and len(whole) > 200
    for key, tensor in whole.items():
        np.testing.assert_allclose(sharded[key], tensor, rtol=1e-4, atol=1e-6, err_msg=key)
    exports = [tmp_path / f"{folder.parents[2].name}-exported" for folder in folders]
    for folder, exported in zip(folders, exports, strict=True):
        assert main(["convert", "export", str(folder), str(exported)]) == 0
    names = [sorted(path.name for path in exported.iterdir()) for exported in exports]
    assert names[0] == names[1] and any(name.endswith(".safetensors") for name in names[0])


def refused(message: str) -> str:
    """What is said where Megatron-FSDP fails with a message while it takes a model apart."""
    import nemo.lightning as nl

    from molmo2_nemo.nemo.checkpoints import VerifyingStrategy

    def fails(self: Any) -> None:
        raise RuntimeError(message)

    strategy = VerifyingStrategy.__new__(VerifyingStrategy)
    strategy._fsdp, strategy.megatron_parallel = "megatron", []
    with pytest.MonkeyPatch.context() as patch, pytest.raises((UserError, RuntimeError)) as found:
        patch.setattr(nl.MegatronStrategy, "init_model_parallel", fails)
        strategy.init_model_parallel()
    return f"{found.type.__name__}: {found.value}"


def test_layers_that_cannot_be_cut_into_rows_are_named(workers):
    """As on the 4B with adapters of rank 16 on four ranks; anything else stays what it is."""
    (said,) = workers.run(refused, "shape '[-1, 2560]' is invalid for input of size 77824", fit=True)
    assert said.startswith("UserError: parallel.fsdp=megatron") and "another stage.lora.rank, or parallel.fsdp=" in said
    assert workers.run(refused, "another", fit=True) == ["RuntimeError: another"]
