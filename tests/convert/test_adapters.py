"""A stage with adapters by the real trainer: what moves, the same under another layout, merged by export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from molmo2_nemo.convert import export_checkpoint, import_checkpoint
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.convert.names import canonical_shapes
from molmo2_nemo.model.config import LoraConfig, preset, with_options
from molmo2_nemo.rundir.summary import resolve_checkpoint
from molmo2_nemo.settings.schema import to_yaml
from tests.convert.qwen3 import tiny_qwen3_config
from tests.support.packs import demo_packs, tiny_run, train_on_packs
from tests.support.pool import start_megatron

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


def weights_of(cfg: Any) -> dict[str, np.ndarray]:
    """Every tensor of a run's last checkpoint, fp64."""
    checkpoint, lora = MegatronCheckpoint(checkpoint_of(cfg)), cfg.stage.lora if cfg.stage.lora.rank else None
    shapes = canonical_shapes(with_options(preset("tiny"), lora=lora))
    return {key: checkpoint.read(key, shape[0]).double().numpy() for key, shape in shapes.items()}


def test_norms_and_embeddings_beside_adapters(workers: Any, tmp_path: Path) -> None:
    """They move with the adapters, at their own rate; a resumed run is the whole one; export is W + alpha / rank B A
    and the trained norms and embeddings, by arithmetic in numpy, and as transformers' Qwen 3 computes with it."""
    packs, beside = demo_packs(4), replace(LORA, norms=True, embeddings=True)
    first = tiny_run(tmp_path / "first", steps=1)
    workers.run(train_on_packs, first, packs, ranks=1, fit=True)
    logs, runs = [], []
    for folder, parts, layout in (
        ("whole", (3,), {"tensor": 2, "sequence": True}),
        ("parts", (2, 3), {"tensor": 2, "sequence": True}),
        ("pipeline", (3,), {"pipeline": 2}),
    ):
        cfg = tiny_run(tmp_path / folder, **layout)
        cfg.init_from, cfg.stage.lora, cfg.stage.train_vit = str(checkpoint_of(first)), beside, False
        cfg.stage.optim.beside_adapters.lr, cfg.stage.optim.beside_adapters.warmup_steps = 4e-4, 4
        cfg.stage.optim.final_lr_fraction = 1.0  # else the schedule would depend on the number of steps
        for steps in parts:
            cfg.stage.max_steps = steps
            logs.append(workers.run(train_on_packs, cfg, packs, ranks=2, fit=True)[0])
        (Path(cfg.output_dir) / cfg.stage.name / "config.yaml").write_text(to_yaml(cfg))
        runs.append(cfg)
    whole, _, resumed, pipeline = logs
    assert [m["loss"] for m in resumed] == [m["loss"] for m in whole]
    np.testing.assert_allclose([m["loss"] for m in pipeline], [m["loss"] for m in whole], rtol=1e-5)
    assert [m["lr_beside_adapters"] for m in whole] == pytest.approx([1e-4, 2e-4, 3e-4])
    assert [m["lr_llm"] for m in whole] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert all(m["grad_norm_beside_adapters"] > 0 and m["grad_norm_llm"] > 0 for m in whole)
    before, after, again = weights_of(first), weights_of(runs[0]), weights_of(runs[1])
    assert before["decoder.final_layernorm.weight"].shape == (192,)
    for key in after:
        np.testing.assert_array_equal(again[key], after[key], err_msg=key)
        if "lora_" not in key and not key.endswith("k_proj.bias"):
            trains = key.startswith(("connector.", "embedding.")) or (key.startswith("decoder.") and "norm" in key)
            assert (after[key] != before[key]).any() == trains, key

    hf = export_checkpoint(checkpoint_of(runs[0]), tmp_path / "hf", tokenizer="tiny")
    written = safetensors.numpy.load_file(hf / "model.safetensors")
    merged = {k: v for k, v in after.items() if k.startswith("decoder.") and "lora_" not in k}
    for key in list(merged):
        if key.replace("weight", "lora_a") in after:
            low, high = (after[key.replace("weight", part)] for part in ("lora_a", "lora_b"))
            merged[key] = before[key] + 8.0 / 4 * high @ low
    names = {"norm.weight": "final_layernorm.weight"}
    for i in range(4):
        ours, theirs = f"layers.{i}.", f"layers.{i}."
        names |= {
            theirs + "input_layernorm.weight": ours + "input_layernorm.weight",
            theirs + "post_attention_layernorm.weight": ours + "pre_mlp_layernorm.weight",
            theirs + "self_attn.q_norm.weight": ours + "self_attention.q_layernorm.weight",
            theirs + "self_attn.k_norm.weight": ours + "self_attention.k_layernorm.weight",
            theirs + "self_attn.o_proj.weight": ours + "self_attention.linear_proj.weight",
            theirs + "mlp.down_proj.weight": ours + "mlp.linear_fc2.weight",
        }
    expected = {name: merged["decoder." + own] for name, own in names.items()}
    for i in range(4):  # rows of Megatron: for each of 2 key heads its 2 query heads, the key, the value; 32 rows each
        qkv = merged[f"decoder.layers.{i}.self_attention.linear_qkv.weight"].reshape(2, 4, 32, 192)
        expected[f"layers.{i}.self_attn.q_proj.weight"] = qkv[:, :2].reshape(128, 192)
        expected[f"layers.{i}.self_attn.k_proj.weight"] = qkv[:, 2].reshape(64, 192)
        expected[f"layers.{i}.self_attn.v_proj.weight"] = qkv[:, 3].reshape(64, 192)
        gate_up = merged[f"decoder.layers.{i}.mlp.linear_fc1.weight"]
        expected[f"layers.{i}.mlp.gate_proj.weight"], expected[f"layers.{i}.mlp.up_proj.weight"] = np.split(gate_up, 2)
    rows = np.concatenate([after["embedding.base.weight"], after["embedding.extra.weight"]])
    expected["embed_tokens.weight"] = rows
    of_text = {k.removeprefix("model.language_model."): v for k, v in written.items() if "language_model" in k}
    assert of_text.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(of_text[key], value, rtol=0, atol=1e-6, err_msg=key)

    ids = [3, 17, 256, 700, 5, 1000, 42]
    ours_logits = workers.run(adapted_logits, str(checkpoint_of(runs[0])), ids)[0]
    np.testing.assert_allclose(qwen_logits(of_text, ids), ours_logits, rtol=0, atol=2e-5 * np.abs(ours_logits).max())


def adapted_logits(checkpoint: str, ids: list[int]) -> np.ndarray:
    """Job: logits [S, V] of text, computed with adapters beside the frozen weights."""
    from molmo2_nemo.inference.load import load
    from tests.convert.test_initial import text_inputs

    start_megatron()
    model = load(Path(checkpoint))[0]
    assert any("lora_" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        return model(text_inputs(model, ids))[0].numpy()[:, : preset("tiny").text.vocab_size]


def qwen_logits(weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits [S, V] of transformers' Qwen 3 with these weights, whose head is the base rows."""
    import transformers

    model = transformers.Qwen3ForCausalLM(tiny_qwen3_config()).eval()
    state = {f"model.{name}": torch.from_numpy(value) for name, value in weights.items()}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][: preset("tiny").text.vocab_size]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []) or not (missing or unexpected)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


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
