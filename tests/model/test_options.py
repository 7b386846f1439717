"""Choices about attention through the whole model, fp32 attention, and vocabularies that do not divide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.oracle import (
    CASES,
    FIXTURES,
    build,
    example,
    fixture_config,
    fixture_weights,
    micro_batches,
    run_schedule,
)
from tests.support.pool import start_megatron

torch.set_num_threads(1)


# --- visual attention -------------------------------------------------------------------------------------------------


def published_mask(ids: np.ndarray, example_ids: np.ndarray, vocab: int, rule: str) -> torch.Tensor:
    """The published mask rule of one pack of plain examples, from token ids alone, bool [S, S].

    Visual are the 8 kinds of the reference (offsets 0..4 and 6..8); the picture's number counts its first token:
    <low_res_im_start>, or a frame's <im_start>, which in our fixtures always follows text.
    """
    size = len(ids)
    offset = ids - vocab
    visual = np.isin(offset, (0, 1, 2, 3, 4, 6, 7, 8))
    picture = np.zeros(size, int)
    for i in range(size):
        opens = offset[i] == 4 or (offset[i] == 0 and not visual[i - 1])
        picture[i] = (picture[i - 1] if i else 0) + opens
    allowed = np.zeros((size, size), bool)
    for q in range(size):
        for k in range(size):
            if example_ids[q] != example_ids[k]:
                continue
            both = visual[q] and visual[k]
            if rule == "none":
                both = False
            elif rule == "within_image":
                both = both and picture[k] <= picture[q]
            allowed[q, k] = k <= q or both
    return torch.from_numpy(allowed)


def visual_attention_job(rule: str) -> dict[str, torch.Tensor]:
    """Logits of a pack of all cases with the kernel and mask of the product, and with a dense published mask."""
    from molmo2_nemo.attention import across
    from molmo2_nemo.data.collate import collate
    from molmo2_nemo.model.inputs import PackInputs

    start_megatron()
    config = replace(fixture_config("qwen3_tied"), visual_attention=rule)
    model = build(config, fixture_weights("qwen3_tied", config)).eval()
    vocab = config.text.vocab_size
    batch = collate(
        [[example("qwen3_tied", kind) for kind in CASES]], sequence_length=180, im_patch_id=config.text.vocab_size + 2
    )
    batch.labels = batch.loss_weights = None
    allowed = published_mask(batch.input_ids[0], batch.example_ids[0], vocab, rule)

    def dense(q, k, v, region, scale, kernel, slot=None):  # [S, B, heads, H]
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        scores = torch.einsum("qbnh,kbnh->bnqk", q, k) * scale
        return torch.einsum("bnqk,kbnh->qbnh", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)

    product = across.attend
    with torch.no_grad():
        found = {"ours": model(PackInputs.from_batch(batch))[0]}
        across.attend = dense
        try:
            found["dense"] = model(PackInputs.from_batch(batch))[0]
        finally:
            across.attend = product
    return found


def test_visual_attention(workers):
    logits = {}
    for rule in ("image_tokens", "within_image", "none"):
        found = workers.run(visual_attention_job, rule)[0]
        torch.testing.assert_close(found["ours"], found["dense"], atol=2e-5, rtol=0)
        logits[rule] = found["ours"]
    size = [example("qwen3_tied", kind).num_tokens for kind in CASES]
    starts = dict(zip(CASES, np.cumsum([0, *size[:-1]]), strict=True))

    def differs(a: str, b: str, kind: str) -> bool:
        part = slice(starts[kind], starts[kind] + size[CASES.index(kind)])
        return bool((logits[a][part] - logits[b][part]).abs().max() > 1e-3)

    assert not differs("image_tokens", "none", "text")
    assert all(differs("image_tokens", "none", k) and differs("within_image", "none", k) for k in CASES[1:])
    # one picture is one block under both rules; several pictures or frames are not
    assert not differs("image_tokens", "within_image", "image")
    assert differs("image_tokens", "within_image", "multi_image") and differs("image_tokens", "within_image", "video")


# --- fp32 attention ---------------------------------------------------------------------------------------------------


def float32_job(dtype: str) -> dict[str, Any]:
    """Logits with and without fp32 attention, and the dtypes that attention was called with."""
    import torch.nn.functional as F

    from molmo2_nemo.attention import across
    from molmo2_nemo.model.config import with_options

    start_megatron()
    found: dict[str, Any] = {}
    original, text_attention = F.scaled_dot_product_attention, across.attend
    for float32 in (False, True):
        config = with_options(fixture_config("qwen3_tied"), float32_attention=float32)
        params = torch.bfloat16 if dtype == "bf16" else torch.float32
        model = build(config, fixture_weights("qwen3_tied", config), params_dtype=params).eval()
        dtypes: list[torch.dtype] = []
        F.scaled_dot_product_attention = lambda q, *a, dtypes=dtypes, **k: (
            dtypes.append(q.dtype) or original(q, *a, **k)
        )
        across.attend = lambda q, *a, dtypes=dtypes: dtypes.append(q.dtype) or text_attention(q, *a)
        try:
            batch = micro_batches("qwen3_tied", config)[0]
            batch.labels = None
            with torch.no_grad():
                found[f"logits {float32}"] = model(batch).float()
        finally:
            F.scaled_dot_product_attention, across.attend = original, text_attention
        found[f"dtypes {float32}"] = [str(d) for d in dtypes]
    return found


def test_float32_attention_of_vision(workers):
    """In bf16 it moves the encoder and the pooling to fp32 and leaves the language model alone; in fp32, nothing."""
    found = workers.run(float32_job, "bf16")[0]
    assert set(found["dtypes False"]) == {"torch.bfloat16"}
    blocks = fixture_config("qwen3_tied").vision.num_built_layers
    assert found["dtypes True"][: blocks + 1] == ["torch.float32"] * (blocks + 1)
    assert set(found["dtypes True"][blocks + 1 :]) == {"torch.bfloat16"}
    difference = (found["logits True"] - found["logits False"]).abs().max()
    assert 0 < difference < 0.2
    found = workers.run(float32_job, "fp32")[0]
    assert torch.equal(found["logits True"], found["logits False"])


# --- vocabularies -----------------------------------------------------------------------------------------------------


def save_job(folder: str, tensor: int, pipeline: int, name: str) -> dict[str, tuple[int, ...]]:
    """Save a model with its fixture's weights as a checkpoint; shapes of this rank's vocabulary tables."""
    from megatron.core import dist_checkpointing

    start_megatron(tensor=tensor, pipeline=pipeline)
    config = fixture_config(name)
    model = build(config, fixture_weights(name, config))
    dist_checkpointing.save(model.sharded_state_dict(prefix="module."), folder)
    return {n: tuple(p.shape) for n, p in model.named_parameters() if "embedding.base" in n or "output_layer" in n}


def load_job(folder: str, tensor: int, pipeline: int, name: str) -> dict[str, bool]:
    """Load it into a model with other weights; which parameters equal the fixture's, and whether its loss is right."""
    from megatron.core import dist_checkpointing

    from molmo2_nemo.model.init import canonical_name, shard

    start_megatron(tensor=tensor, pipeline=pipeline)
    config = fixture_config(name)
    model = build(config, seed=1)
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), folder)
    model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    expected = fixture_weights(name, config)
    same = {}
    for n, p in model.named_parameters():
        whole = expected[canonical_name(model, n)]
        same[n] = torch.equal(p, shard(model, n, p, whole))
    return same


@pytest.mark.parametrize(
    ("name", "saved", "loaded"),
    [
        ("olmo3", (2, 1), (1, 1)),  # 101 rows, 102 at TP2; own head
        ("olmo3", (1, 1), (2, 2)),
        ("qwen3_tied_odd", (2, 1), (1, 1)),  # 97 rows, 98 at TP2; tied head
        ("qwen3_tied_odd", (2, 2), (1, 1)),
        ("qwen3_tied_odd", (1, 1), (2, 2)),
    ],
)
def test_odd_vocabulary_changes_layout(workers, tmp_path, name, saved, loaded):
    (tmp_path / "checkpoint").mkdir()
    shapes = workers.run(save_job, str(tmp_path / "checkpoint"), *saved, name, ranks=saved[0] * saved[1])
    rows = -(-fixture_config(name).text.vocab_size // saved[0])
    assert all(shape[0] == rows for rank in shapes for shape in rank.values())
    for same in workers.run(load_job, str(tmp_path / "checkpoint"), *loaded, name, ranks=loaded[0] * loaded[1]):
        assert all(same.values()), [n for n, equal in same.items() if not equal]


def fresh_job(tensor: int, pipeline: int, name: str) -> dict[str, torch.Tensor]:
    """This rank's fresh parameters, under canonical names."""
    from molmo2_nemo.model.init import canonical_name

    start_megatron(tensor=tensor, pipeline=pipeline)
    model = build(fixture_config(name))
    return {canonical_name(model, n): p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["olmo3", "qwen3_tied_odd"])
def test_fresh_parameters_do_not_depend_on_the_layout(workers, name):
    """Bit by bit, also for a vocabulary that is padded; gathered here by hand, not by the code that cut them."""
    whole = workers.run(fresh_job, 1, 1, name)[0]
    ranks = workers.run(fresh_job, 2, 2, name, ranks=4)  # Megatron's order: tensor ranks are neighbours
    for stage in (ranks[:2], ranks[2:]):
        for key, first in stage[0].items():
            parts = [first, stage[1][key]]
            expected = whole[key]
            if first.shape == expected.shape:
                assert all(torch.equal(p, expected) for p in parts), key
                continue
            if "linear_fc1" in key:
                gates, ups = zip(*(p.chunk(2) for p in parts), strict=True)
                joined = torch.cat((*gates, *ups))
            else:
                dim = next(i for i in range(first.dim()) if first.shape[i] != expected.shape[i])
                joined = torch.cat(parts, dim)[: expected.shape[0]]
            assert torch.equal(joined, expected), key


def generate_job(name: str) -> int:
    """The most likely id of the last position of every case: never an extra one, whatever the extra rows hold."""
    start_megatron(tensor=torch.distributed.get_world_size())
    config = fixture_config(name)
    weights = fixture_weights(name, config)
    weights["embedding.extra.weight"] = weights["embedding.extra.weight"] * 100
    batches = micro_batches(name, config)
    for batch in batches:
        batch.labels = None
    model = build(config, weights).eval()
    return sum(x.shape[-1] for x in run_schedule(model, batches[:1], backward=False))


def test_only_base_ids_have_logits(workers):
    for name in ("olmo3", "qwen3_tied_odd"):
        columns = [sum(workers.run(generate_job, name, ranks=ranks)) for ranks in (1, 2)]
        assert columns == [fixture_config(name).text.vocab_size] * 2


def wrong_shape_job() -> str:
    start_megatron()
    config = fixture_config("olmo3")
    weights = fixture_weights("olmo3", config)
    weights["decoder.final_layernorm.weight"] = torch.ones(7)
    with pytest.raises(ValueError) as error:
        build(config, weights)
    return str(error.value)


def test_weights_of_another_model(workers):
    message = workers.run(wrong_shape_job)[0]
    assert "decoder.final_layernorm.weight" in message and "[7]" in message and "[32]" in message


def test_fixture_vocabularies_are_odd():
    assert [fixture_config(n).text.vocab_size for n in ("olmo3", "qwen3_tied_odd")] == [101, 97]
    assert (FIXTURES / "olmo3" / "model.safetensors").exists()
