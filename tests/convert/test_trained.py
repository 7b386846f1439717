"""Imported, trained one step by the real trainer at TP2 x PP2, exported: only what trains has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo2_nemo.convert import export_checkpoint, import_checkpoint, init_checkpoint
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.convert.names import FORMATS, Format, canonical_shapes
from molmo2_nemo.model.config import preset
from molmo2_nemo.rundir.summary import resolve_checkpoint
from tests.convert.qwen3 import tiny_qwen3_config
from tests.convert.test_checkpoints import load, make_source
from tests.convert.test_names import family
from tests.support.packs import demo_packs, tiny_run, train_on_packs

torch.set_num_threads(1)
BASE = "embedding.base.weight"


@pytest.fixture(scope="module")
def packs() -> Any:
    return demo_packs(4)


def train_family(name: str, cfg: Any, packs: Any) -> None:
    """Job: train a model of this family, which for the time of the job is a preset."""
    from molmo2_nemo.model.config import PRESETS

    PRESETS[name] = lambda: replace(family(name), name=name)
    try:
        train_on_packs(cfg, packs)
    finally:
        del PRESETS[name]


@pytest.mark.parametrize(
    ("name", "written_as"), [("qwen3_tied", "native"), ("qwen3_untied", "remote"), ("olmo3", "native")]
)
def test_only_what_trains_has_changed(workers: Any, packs: Any, tmp_path: Path, name: str, written_as: Format) -> None:
    config = family(name)
    source = make_source(tmp_path / "hf", config, written_as, torch.float32)
    imported = import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    cfg = tiny_run(tmp_path / "run", steps=1, tensor=2, pipeline=2)
    cfg.model.preset, cfg.init_from, cfg.stage.train_base_embedding = name, str(imported), False
    cfg.stage.optim.vit.warmup_steps = cfg.stage.optim.connector.warmup_steps = cfg.stage.optim.llm.warmup_steps = 0
    workers.run(train_family, name, cfg, packs, ranks=4, fit=True)
    done = resolve_checkpoint(tmp_path / "run" / cfg.stage.name)

    before, after = MegatronCheckpoint(imported), MegatronCheckpoint(done)
    shapes = canonical_shapes(config)
    for key, shape in shapes.items():
        same = torch.equal(before.read(key), after.read(key, shape[0]))
        if not key.endswith("k_proj.bias"):  # a key bias has no gradient but rounding
            assert same == (key == BASE), key  # the base rows (and so a tied head) are frozen, all else learns
        assert after.dtype(key) == torch.float32
    for target in FORMATS:
        hf = export_checkpoint(done, tmp_path / target, format=target, model_config=config, tokenizer="tiny")
        again = MegatronCheckpoint(import_checkpoint(hf, tmp_path / f"again-{target}"))
        for key, shape in shapes.items():
            assert torch.equal(again.read(key), after.read(key, shape[0])), key
        if target == written_as:
            out = load(hf)
            assert {n: (t.shape, t.dtype) for n, t in out.items()} == {n: (t.shape, t.dtype) for n, t in source.items()}
            frozen = {n for n in out if torch.equal(out[n], source[n])}
            table = "model.transformer.wte.embedding" if target == "remote" else "lm_head.weight"
            # natively, the table's frozen base rows and its trained extra rows are one tensor
            assert (table in frozen) == (target == "remote" or config.text.tie_embeddings)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_one_starts_from_base_models(workers: Any, packs: Any, tmp_path: Path, precision: Any) -> None:
    """`convert init` for the sizes of `tiny`, trained for a step with learning rate 0: every weight arrived, rounded
    to the run's precision."""
    import transformers

    config = preset("tiny")
    vision = config.vision
    vit = transformers.SiglipVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        image_size=130,
        patch_size=vision.patch_size,
    )
    transformers.Qwen3ForCausalLM(tiny_qwen3_config()).save_pretrained(tmp_path / "llm")
    transformers.SiglipVisionModel(vit).save_pretrained(tmp_path / "vit")
    start = init_checkpoint(tmp_path / "llm", tmp_path / "vit", tmp_path / "start", model="tiny")
    cfg = tiny_run(tmp_path / "run", steps=1, tensor=2)
    cfg.init_from, cfg.cluster.precision = str(start), precision
    cfg.stage.optim.vit.lr = cfg.stage.optim.connector.lr = cfg.stage.optim.llm.lr = 0.0
    workers.run(train_on_packs, cfg, packs, ranks=2, fit=True)
    done = resolve_checkpoint(tmp_path / "run" / cfg.stage.name)
    before, after = MegatronCheckpoint(start), MegatronCheckpoint(done)
    for key in canonical_shapes(config):
        one, other = before.read(key), after.read(key)
        if precision == "bf16":
            one, other = one.bfloat16(), other.bfloat16()
        assert torch.equal(one, other), key
