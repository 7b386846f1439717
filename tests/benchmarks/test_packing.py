"""benchmarks/packing.py: packs and their work per rank on a stream like the published mixture."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import example_pairs, measure
from molmo2_nemo.data.counts import allowed_pairs
from tests.support.trees import Tree, pack, token_mask


def test_spread_on_a_stream_like_the_mixture():
    """8 data-parallel ranks, 128 packs a step, packs as the packer makes them of an SFT-like stream."""
    found = measure("balanced", "SFT", 256, 48)
    assert found["spread_balanced"][2] <= 1.05 < found["spread_as_packed"][2] + 0.05
    assert found["efficiency"] > 0.97 and found["longest_wait"] <= 96


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.lists(st.integers(0, 7), max_size=3), st.lists(st.integers(1, 6), max_size=3))
def test_pairs_of_an_example_follow_from_its_sizes(text, images, branches):
    """Where all visual tokens lie in the root."""
    tree = Tree((1, *[text] * len(images)), tuple(images), tuple(branches))
    described, root = pack([tree]), 1 + (text * len(images)) + sum(images)
    counted = example_pairs(root, sum(images), branches)
    assert counted == allowed_pairs(*described) == int(token_mask([[tree]]).rows(0, described.shape[1]).sum())
