"""Rotary tables and their use against complex multiplication, position by position in float64."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.model.config import TextConfig, YarnConfig, preset, with_rope_factor, with_rope_scaling
from molmo2_nemo.model.rotary import RotaryTables, rotary_tables, table_of_layer, yarn_inverse_frequencies

torch.set_num_threads(1)
TEXT = TextConfig(head_dim=8, rotary_base=10_000.0)
YARN = YarnConfig(layers=(1,), factor=4.0, attention_factor=1.25, original_max_position=256)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=6), st.sampled_from([8, 12, 64, 128]))
def test_plain_rotation(positions, head_dim):
    """Dimension j and j + H / 2 are one complex number, turned by position * base^(-2j / H)."""
    text = replace(TEXT, head_dim=head_dim)
    check(text, "plain", positions, [text.rotary_base ** (-2 * j / head_dim) for j in range(head_dim // 2)], 1.0)


def test_yarn_rotation():
    text = replace(TEXT, yarn=YARN)
    check(text, "yarn", [0, 3, 17, 255, 1000], yarn_inverse_frequencies(text, YARN).double().tolist(), 1.25)


@pytest.mark.parametrize(("kind", "factor"), [("linear", 2.0), ("yarn", 2.0), ("yarn", 4.5)])
def test_scaling_for_longer_packs_against_transformers(kind, factor):
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = with_rope_scaling(preset("8b").text, kind, factor)
    theirs = Qwen3Config(head_dim=128, hidden_size=4096, num_attention_heads=32, rope_theta=text.rotary_base)
    theirs.max_position_embeddings = 36864
    theirs.rope_scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": 36864}
    inverse, attention = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    assert text.max_position == 36864 * factor
    table = {table_of_layer(text).get(layer, "plain") for layer in range(36)}
    check(text, *table, [0, 3, 255, 36864 + 17], inverse.double().tolist(), attention)


@pytest.mark.parametrize(
    ("size", "kind", "factor", "message"),
    [
        ("8b", "none", 2.0, "needs model.rope_scaling"),
        ("8b", "yarn", 1.0, "needs model.rope_factor > 1"),
        ("8b", "yarn", math.inf, "needs model.rope_factor > 1, not inf"),
        ("8b", "linear", math.nan, "needs model.rope_factor > 1, not nan"),
        ("8b", "none", math.nan, "needs model.rope_scaling"),
        ("o7b", "yarn", 8.0, "YaRN of factor 8 over 8192 positions already, so 65536 need none"),
        ("o7b", "linear", 2.0, "YaRN already"),
        ("o7b", "base", 2.0, "YaRN already"),
        ("8b", "base", 1.0, "needs model.rope_factor > 1"),
    ],
)
def test_scaling_that_makes_no_sense(size, kind, factor, message):
    with pytest.raises(ValueError, match=message):
        with_rope_scaling(preset(size).text, kind, factor)


def check(text: TextConfig, table: str, positions: list[int], inverse: list[float], factor: float) -> None:
    from molmo2_nemo.fused.rotary import apply_rotary

    ids = torch.tensor([positions, [p // 2 for p in positions]])  # [B, T]: two packs with positions of their own
    cos, sin = rotary_tables(text, ids)[table]
    assert cos.shape == (len(positions), 2, 1, text.head_dim) and cos.dtype == torch.float32
    x = torch.randn(len(positions), 2, 3, text.head_dim, generator=torch.Generator().manual_seed(0))
    got = apply_rotary(x, cos, sin)
    half = text.head_dim // 2
    for t in range(len(positions)):
        for b in range(2):
            for j in range(half):
                turn = factor * cmath.exp(1j * int(ids[b, t]) * inverse[j])
                for head in range(3):
                    z = complex(x[t, b, head, j], x[t, b, head, j + half]) * turn
                    # an fp32 angle of 40,000 is good to 2e-3; small ones to 1e-6
                    error = 1e-5 + 1e-7 * int(ids[b, t])
                    assert abs(complex(got[t, b, head, j], got[t, b, head, j + half]) - z) <= error * abs(x).max()


def test_a_higher_base_against_transformers():
    """Transformers' dynamic kind: base * (factor * length / native - (factor - 1)) ^ (H / (H - 2)); with a factor
    of 1 and a longer sequence it is the rule of NTK-aware scaling."""
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = with_rope_scaling(preset("8b").text, "base", 4.0)
    base = preset("8b").text.rotary_base
    theirs = Qwen3Config(head_dim=128, hidden_size=4096, num_attention_heads=32, rope_theta=base)
    theirs.max_position_embeddings = 36864
    theirs.rope_scaling = {"rope_type": "dynamic", "factor": 1.0}
    inverse, attention = ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", seq_len=4 * 36864)
    assert text.max_position == 4 * 36864
    check(text, "plain", [0, 3, 255, 36864 + 17], inverse.double().tolist(), attention)
    given = with_rope_scaling(preset("8b").text, "base", 2.0, 8e6)
    assert given.rotary_base == 8e6 and given.max_position == 2 * 36864


@pytest.mark.parametrize("kind", ["linear", "yarn", "base"])
def test_a_lower_factor_for_a_phase_is_the_model_that_was_built_with_it(kind):
    native = preset("8b").text
    text = with_rope_scaling(native, kind, 8.0)
    positions = torch.arange(0, 40_000, 977)[None]
    for factor in (2.0, 1.0):
        tables = RotaryTables(text)
        tables.tables(positions)
        tables.use(with_rope_factor(text, native, kind, factor))
        expected = rotary_tables(with_rope_scaling(native, kind, factor) if factor > 1 else native, positions)
        name = table_of_layer(text).get(0, "plain")
        for got, want in zip(tables.tables(positions)[name], expected["plain" if factor == 1 else name], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-2 if factor == 1 and kind == "yarn" else 0)
        tables.use(text)
        assert torch.equal(tables.tables(positions)[name][0], rotary_tables(text, positions)[name][0])


def test_yarn_keeps_high_and_stretches_low_frequencies():
    text = TextConfig(head_dim=128, rotary_base=500_000.0)
    yarn = YarnConfig(layers=(0,))
    ratio = yarn_inverse_frequencies(text, yarn) / yarn_inverse_frequencies(text, replace(yarn, factor=1.0))
    assert (ratio[:19] == 1).all()
    torch.testing.assert_close(ratio[35:], torch.full((29,), 1 / 8))
    assert (ratio.diff() <= 1e-7).all()


def test_scores_depend_on_distance_only():
    from molmo2_nemo.fused.rotary import apply_rotary

    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(1))
    text = replace(TEXT, head_dim=64)

    def score(m: int, n: int) -> float:
        turned = [apply_rotary(x, *rotary_tables(text, torch.tensor([[p]]))["plain"]) for x, p in ((q, m), (k, n))]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-3)
    assert not math.isclose(score(7, 3), score(9, 3), abs_tol=1e-2)
