"""Features of a frozen encoder kept on disk, through the real trainer: the same losses to the last bit, and no crop
encoded a second time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from molmo2_nemo.data.config import SourceConfig
from molmo2_nemo.model.config import LoraConfig
from molmo2_nemo.rundir.checkpoint_manifest import step_folder
from tests.support.packs import demo_data, demo_packs, tiny_run, train_on_packs
from tests.support.thorough import mostly

EPOCH = 2  # steps
TRACED = ("loss", "tasks", "grad_norm_connector", "grad_norm_llm", "tokens", "crops")


def watched(cfg: Any, packs: Any) -> tuple[list[dict[str, Any]], int]:
    """Job: metrics, and how many crops this rank's encoder was given."""
    from molmo2_nemo.model.vision import VisionEncoder

    crops, forward = [], VisionEncoder.forward

    def seen(self: Any, given: Any) -> Any:
        crops.append(len(given))
        return forward(self, given)

    VisionEncoder.forward = seen  # type: ignore
    try:
        return train_on_packs(cfg, packs), sum(crops)
    finally:
        VisionEncoder.forward = forward  # type: ignore


def run(workers: Any, folder: Any, packs: Any, kept: Any = None, ranks: int = 1, **options: Any):
    """Metrics and encoded crops of all ranks, in a run of two epochs."""
    lora, inputs, precision = options.pop("lora", 0), options.pop("inputs", "auto"), options.pop("precision", "fp32")
    cfg = tiny_run(folder, 2 * EPOCH, **options)
    cfg.cluster.precision = precision
    cfg.save_every = EPOCH
    cfg.stage.train_vit, cfg.stage.lora = False, LoraConfig(rank=lora)
    cfg.stage.residual_dropout = 0.1
    cfg.kernels.inputs = inputs
    cfg.data.feature_cache.path = None if kept is None else str(kept)
    cfg.data.feature_cache.keep_free_gib = 0.0
    found = workers.run(watched, cfg, packs, ranks=ranks, fit=True)
    return found[0][0], sum(count for _, count in found)


def traced(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return ({name: line.get(name) for name in TRACED} for line in lines)


@pytest.fixture(scope="module")
def packs():
    return demo_packs(4 * EPOCH)


LAYOUTS = {
    "lora, bf16": (1, {"lora": 4, "precision": "bf16"}),
    "lora, ahead, recomputed chunks": (
        1,
        {"lora": 4, "inputs": "ahead", "memory": {"recompute": "full", "vision_chunk": 3}},
    ),
    "cp2": (2, {"context": 2}),
    "tp2 sp, ahead": (2, {"tensor": 2, "sequence": True, "inputs": "ahead"}),
    "pp2": (2, {"pipeline": 2}),
}


@pytest.mark.parametrize("name", mostly(LAYOUTS, "lora, ahead, recomputed chunks", "cp2"))
def test_two_epochs_with_and_without(workers, packs, tmp_path, name):
    ranks, options = LAYOUTS[name]
    without, _ = run(workers, tmp_path / "without", packs, ranks=ranks, **options)
    lines, encoded = run(workers, tmp_path / "with", packs, tmp_path / "kept", ranks=ranks, **options)
    assert list(traced(lines)) == list(traced(without))
    assert not any(key.startswith("features_") for key in without[0])
    crops = sum(line["crops"] for line in lines) // 2
    assert crops > 20
    first, second = lines[:EPOCH], lines[EPOCH:]
    assert sum(line["features_hits"] + line["features_misses"] for line in first) == crops
    assert [line["features_misses"] for line in second] == [0] * EPOCH
    assert sum(line["features_hits"] for line in second) == crops
    chunks = options.get("memory", {}).get("vision_chunk")
    misses = sum(line["features_misses"] for line in first)
    assert encoded == (2 if chunks else 1) * misses  # chunks are recomputed in backward
    entries = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert sum(line["features_written"] for line in lines) <= sum(path.stat().st_size for path in entries)
    assert sum(line["tflops"] * line["seconds"] for line in second) < sum(
        line["tflops"] * line["seconds"] for line in without[EPOCH:]
    )


def test_another_layout_reads_what_one_kept_and_a_resume_gives_the_same_bits(workers, packs, tmp_path):
    whole, encoded = run(workers, tmp_path / "run", packs, tmp_path / "kept")
    assert encoded
    for kept in (None, tmp_path / "kept"):
        shutil.rmtree(tmp_path / "run" / "sft" / "checkpoints" / step_folder(2 * EPOCH))
        resumed, encoded = run(workers, tmp_path / "run", packs, kept)
        assert list(traced(resumed)) == list(traced(whole))
        assert (encoded > 0) == (kept is None)
    _, encoded = run(workers, tmp_path / "cp2", packs, tmp_path / "kept", ranks=2, context=2)
    assert encoded == 0


def real(cfg: Any) -> list[dict[str, Any]]:
    """Job: train with the real loader."""
    from molmo2_nemo.nemo.train import train
    from molmo2_nemo.rundir.lines import read_metrics
    from molmo2_nemo.rundir.paths import stage_dir

    train(cfg)
    return read_metrics(stage_dir(cfg))


def test_with_the_real_loader_and_validation(workers, shards, tmp_path):
    """Two replicas share a folder; packs differ in every epoch, and crops do not."""
    found = {}
    for way in ("without", "with"):
        cfg = tiny_run(tmp_path / way, 6)
        cfg.data = demo_data(shards)
        cfg.data.num_workers = 1
        cfg.stage.train_vit, cfg.stage.lora = False, LoraConfig(rank=4)
        cfg.validation.sources = {"held": SourceConfig(path=str(shards / "pretrain"))}
        cfg.validation.examples, cfg.validation.every = 5, 3
        if way == "with":
            cfg.data.feature_cache.path, cfg.data.feature_cache.keep_free_gib = str(tmp_path / "kept"), 0.0
            cfg.data.feature_cache.verify = 0.5
        lines = workers.run(real, cfg, ranks=2, fit=True)[0]
        text = (tmp_path / way / "sft" / "validation.jsonl").read_text()
        held = [json.loads(line)["losses"] for line in text.splitlines()]
        found[way] = list(traced(lines)), held, lines
    assert found["with"][0] == found["without"][0]
    assert found["with"][1] == found["without"][1] and len(found["with"][1]) == 2
    lines = found["with"][2]
    assert lines[0]["features_misses"] > 10
    assert [line["features_misses"] for line in lines[-2:]] == [0, 0] and lines[-1]["features_hits"] > 10
    assert sum(line["features_checked"] for line in lines) > 10
    assert not any(line["features_different"] or line["features_damaged"] for line in lines)
