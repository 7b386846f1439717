"""Running out of memory ends in one line that says which settings are left to try."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from molmo2_nemo.errors import USER_ERROR
from molmo2_nemo.launch.out_of_memory import advice, remedies
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import by_dotted_key, to_dict

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.31 GiB is "
    "free. Including non-PyTorch memory, this process has 138.49 GiB memory in use."
)
TOO_MUCH = 1 << 60  # bytes


def raised(make) -> Exception:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        make()
    return caught.value


def test_of_a_gpu():
    text = advice(torch.cuda.OutOfMemoryError(CUDA), RunConfig(), rank=3)
    assert text.startswith(
        "process 3 ran out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB). What is left to try, "
        "cheapest first: stage.micro_batch_size=1; memory.loss_chunk=256; memory.vision_chunk=16 (the encoder is "
        "recomputed in the backward pass)"
    )
    assert "memory.offload=true" in text and "parallel.context=2 " in text and "\n" not in text


@pytest.mark.parametrize("recorded", [False, True])
def test_the_snapshot_of_what_was_held_is_named(recorded):
    cfg = RunConfig()
    cfg.log.record_memory_history = recorded
    error = torch.cuda.OutOfMemoryError(CUDA)
    text = advice(error, cfg, 3, Path("runs/x/sft/memory/out-of-memory.rank-3.json"))
    assert "What the memory held: runs/x/sft/memory/out-of-memory.rank-3.json, which molmo2 report draws" in text
    assert ("log.record_memory_history=true also by whom" in text) is not recorded
    assert "memory held" not in advice(error, cfg)


@pytest.mark.parametrize("make", [lambda: torch.empty(TOO_MUCH, dtype=torch.uint8), lambda: np.ones(1 << 50, np.uint8)])
def test_of_the_host(make):
    cfg = RunConfig()
    cfg.data.num_workers = 4
    text = advice(raised(make), cfg, snapshot=Path("earlier.json"))  # of an allocation that was tried again
    assert "earlier.json" not in text, "a GPU's memory is not the host's"
    assert "ran out of host memory (" in text and "first: data.num_workers=2 (copies of the loader)" in text
    assert "offload" not in text  # it would take more of the host's


@pytest.mark.parametrize("make", [lambda: torch.ones(2) @ torch.ones(3), lambda: torch.ones(2).view(3)])
def test_other_errors_are_not_about_memory(make):
    assert advice(raised(make), RunConfig()) is None


def test_only_what_is_left_is_suggested():
    cfg = RunConfig()
    assert not cfg.memory.offload and len(remedies(cfg)) == 9
    cfg.stage.micro_batch_size, cfg.parallel.context = 1, 2
    cfg.memory.recompute, cfg.memory.mlp_tiles, cfg.memory.vision_chunk = "full", 4, 8
    cfg.memory.offload, cfg.memory.loss_chunk = True, 128
    assert remedies(cfg)[0] == "memory.recompute_attention=true (attention is recomputed)"
    cfg.memory.recompute_attention, cfg.memory.recompute_vision = True, False
    assert remedies(cfg)[0] == "memory.recompute_vision=true (the encoder's blocks are recomputed)"
    cfg.memory.recompute_vision = None
    assert remedies(cfg)[0].startswith(
        "memory.recompute=full memory.recompute_layers=null memory.sequence_chunk=4096 ("
    )
    cfg.memory.sequence_chunk = 4096
    assert [text.split()[0] for text in remedies(cfg)] == ["parallel.context=4", "smaller"]
    cfg.cluster.precision = "bf16"
    assert remedies(cfg)[0] == "memory.optimizer_offload=true (AdamW on the host)"
    cfg.cluster.precision = "fp32"
    cfg.memory.recompute_layers, cfg.memory.sequence_chunk = 2, None
    assert remedies(cfg)[0].startswith("memory.recompute=full memory.recompute_layers=null")


def test_replicas_may_share_parameters():
    cfg = RunConfig()
    assert not any("parallel.fsdp" in text for text in remedies(cfg))
    cfg.parallel.data = 2
    assert "parallel.fsdp=megatron (parameters are gathered layer by layer)" in remedies(cfg)
    cfg.parallel.tensor = 2
    assert not any("parallel.fsdp" in text for text in remedies(cfg))


def layouts(
    length: int = 16384, crops: int = 128, vision_chunk: int | None = 16, devices: int | None = None, **parallel
) -> list[str]:
    """What is suggested beside settings of memory, for the 8b model."""
    cfg = RunConfig()
    cfg.model.preset, cfg.stage.global_batch_size, cfg.memory.vision_chunk = "8b", 128, vision_chunk
    cfg.data.packing.sequence_length, cfg.data.packing.max_crops = length, crops
    cfg.cluster.devices = devices
    for name, value in parallel.items():
        setattr(cfg.parallel, name, value)
    return [text for text in remedies(cfg) if text.startswith("parallel.context")]


DYNAMIC = {"context": 8, "dynamic_context": True}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"context": 8, "data": 4}, ["parallel.context=16 parallel.data=2 (16 ranks share a pack)"]),
        ({"context": 8}, ["parallel.context=16 (16 ranks share a pack; takes 16 processes)"]),
        ({"context": 8, "devices": 32}, ["parallel.context=16 (16 ranks share a pack)"]),
        ({"context": 8, "devices": 8}, ["parallel.context=16 (16 ranks share a pack; takes 16 processes)"]),
        # 64 ranks cannot shard 32 heads
        (
            {"context": 32},
            ["parallel.context=64 parallel.context_ulysses=32 (64 ranks share a pack; takes 64 processes)"],
        ),
        ({"context": 8, "length": 16376}, []),  # not a multiple of 16
        # what a rank holds is what its limits say, as long as they are above a static share
        (
            {**DYNAMIC, "context_tokens": 16384},
            ["parallel.context_tokens=8192 (packs of more tokens get more ranks)"],
        ),
        (
            {**DYNAMIC, "context_tokens": 3000, "context_crops": 64, "vision_chunk": None},
            [
                "parallel.context_tokens=2048 (packs of more tokens get more ranks)",
                "parallel.context_crops=32 (packs of more crops get more ranks)",
            ],
        ),
        (
            {**DYNAMIC, "context_tokens": 2048, "context_crops": 16, "data": 2},
            [
                "parallel.context=16 parallel.context_tokens=1024 parallel.context_crops=8 parallel.data=1 "
                "(16 ranks share a pack)"
            ],
        ),
    ],
)
def test_layouts_that_can_work(settings, expected):
    assert layouts(**settings) == expected


def test_suggested_settings_exist():
    known = set(by_dotted_key(to_dict(RunConfig())))
    words = [word.partition("=")[0] for text in remedies(RunConfig()) for word in text.split() if "." in word]
    assert words and all(word in known for word in words)


def test_a_worker_reports_it(tmp_path, monkeypatch, capsys):
    """The whole way of an error: a training that asks for more than there is."""
    from molmo2_nemo.launch import worker
    from molmo2_nemo.nemo import train

    cfg = RunConfig(output_dir=str(tmp_path))
    (tmp_path / cfg.stage.name).mkdir()
    monkeypatch.delenv(worker.ERROR_DIR, raising=False)
    monkeypatch.setattr(train, "train", lambda cfg: torch.empty(TOO_MUCH, dtype=torch.uint8))
    assert worker.run(cfg) == USER_ERROR
    shown = capsys.readouterr().err
    assert shown.startswith("molmo2: error: process 0 ran out of host memory (") and shown.count("\n") == 1
    assert "Traceback" in (tmp_path / cfg.stage.name / "errors.jsonl").read_text()
