"""The number of pairs that a mask allows, against the rule itself, pair by pair; what a batch holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.data.counts import allowed_pairs
from molmo2_nemo.data.example import PAD_EXAMPLE, ROOT_BRANCH
from tests.support.trees import RULES

torch.set_num_threads(1)


def allowed(q: int, k: int, pack: tuple[np.ndarray, np.ndarray, np.ndarray], visual_attention: str) -> bool:
    """The mask rule, written out for one pair."""
    examples, branches, blocks = pack
    if examples[q] != examples[k] or examples[q] == PAD_EXAMPLE or branches[k] not in (ROOT_BRANCH, branches[q]):
        return False
    both = blocks[q] > 0 and blocks[k] > 0
    later = {"none": False, "image_tokens": both, "within_image": both and blocks[k] <= blocks[q]}
    return k <= q or bool(later[visual_attention])


def random_pack(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples with a root and branches, pictures anywhere, padding behind."""
    examples, branches, blocks = [], [], []
    block = 0
    for example in range(rng.integers(1, 4)):
        for branch in [ROOT_BRANCH, *range(rng.integers(0, 3))]:
            for _ in range(rng.integers(1, 4)):
                length = int(rng.integers(1, 5))
                visual = rng.random() < 0.5
                block += int(visual)
                examples += [example] * length
                branches += [branch] * length
                blocks += [block if visual else 0] * length
    pad = int(rng.integers(0, 4))
    return (
        np.array(examples + [PAD_EXAMPLE] * pad),
        np.array(branches + [ROOT_BRANCH] * pad),
        np.array(blocks + [0] * pad),
    )


@pytest.mark.parametrize("visual_attention", ["image_tokens", "within_image", "none"])
def test_pairs_are_the_masks_area(visual_attention: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        pack = random_pack(rng)
        size = len(pack[0])
        counted = sum(allowed(q, k, pack, visual_attention) for q in range(size) for k in range(size))
        assert allowed_pairs(*pack, visual_attention=visual_attention) == counted


def test_known_areas() -> None:
    zeros, root = np.zeros(10, dtype=int), np.full(10, ROOT_BRANCH)
    assert allowed_pairs(zeros, root, zeros) == 55
    assert allowed_pairs(zeros, root, zeros + 1) == 100
    assert allowed_pairs(zeros + PAD_EXAMPLE, root, zeros) == 0
    # one 384-frame film of 81 tokens a frame: its patches alone are 71 % of a full 36,864 x 36,864 matrix
    film = np.zeros(36864, dtype=int)
    film[1000 : 1000 + 384 * 81] = 1
    zeros = np.zeros(36864, dtype=int)
    pairs = allowed_pairs(zeros, np.full(36864, ROOT_BRANCH), film)
    assert pairs > 0.71 * 36864**2
    causal_part = 36864 * 36865 // 2
    assert pairs == causal_part + 31104 * 31103 // 2


RUNS = st.lists(
    st.tuples(st.integers(-1, 3), st.integers(-1, 2), st.booleans(), st.integers(1, 4)), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None)
@given(st.lists(RUNS, min_size=1, max_size=2), st.sampled_from(RULES))
def test_any_description_is_counted_as_the_rule_says(packs, rule):
    """Examples that return, branches before their root, images in branches: nothing is taken for granted."""
    size = max(sum(length for *_, length in runs) for runs in packs)
    described = np.full((3, len(packs), size), -1, np.int64)
    described[2] = 0
    for row, runs in enumerate(packs):
        start = 0
        for image, (example, branch, visual, length) in enumerate(runs, 1):
            described[:, row, start : start + length] = np.array([example, branch, image * visual])[:, None]
            start += length
    real = described[0] != PAD_EXAMPLE
    allowed = TokenMask(*torch.from_numpy(described), rule).rows(0, size).numpy()
    assert allowed_pairs(*described, rule) == (allowed & real[:, :, None] & real[:, None]).sum()
