"""The split of the mask into plain segments against the rule itself, pair by pair."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.attention import flash
from molmo2_nemo.attention.flash import group_segments
from molmo2_nemo.attention.flex import BLOCK, block_lists
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.regions import MaskRegion, region_of, runs_of
from molmo2_nemo.data.counts import allowed_pairs
from tests.support.trees import RULES, Tree, token_mask


def lengths(most: int, shortest: int = 1, longest: int = 9) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(shortest, longest), max_size=most).map(tuple)


trees = st.builds(
    Tree,
    text=st.lists(st.integers(0, 6), min_size=1, max_size=6).map(lambda words: (words[0] + 1, *words[1:])),
    pictures=lengths(5),
    branches=st.one_of(lengths(4), lengths(50, longest=2)),
    pictures_in_branches=st.booleans(),
)
packs = st.lists(st.lists(trees, max_size=4), min_size=1, max_size=2)
rules = st.sampled_from(RULES)


def pairs_of_segments(region: MaskRegion) -> np.ndarray:
    """How often each pair is in a segment, [B, Q, K]."""
    found = np.zeros((region.mask.on_host().shape[1], *region.shape), np.int64)
    for segment in region.segments:
        ones = np.ones((len(segment.queries), len(segment.keys)), np.int64)
        table = {"full": ones, "causal": np.tril(ones), "reverse": np.triu(ones)}[segment.kind]
        assert table.sum() == segment.pairs
        found[segment.pack][np.ix_(segment.queries, segment.keys)] += table
    return found


@settings(max_examples=60, deadline=None)
@given(packs, rules, st.integers(40, 90), st.data())
def test_segments_hold_every_allowed_pair_once(trees, rule, size, data):
    mask = token_mask(trees, size, rule)
    expected = mask.rows(0, size).numpy()
    whole = region_of(mask)
    assert (pairs_of_segments(whole) == expected).all()
    assert whole.pairs == expected.sum()
    edges = st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True).map(sorted).map(tuple)
    (q0, q1), (k0, k1) = data.draw(edges), data.draw(edges)
    part = MaskRegion(mask, (q0, q1), (k0, k1))
    assert (pairs_of_segments(part) == expected[:, q0:q1, k0:k1]).all()
    some = st.sets(st.integers(0, size - 1), min_size=1).map(lambda places: np.array(sorted(places)))
    asking, asked = data.draw(some), data.draw(some)
    runs, same = MaskRegion(mask, runs_of(asking), runs_of(asked)), MaskRegion(mask, runs_of(asking), runs_of(asking))
    cut = expected[:, asking[:, None], asked], expected[:, asking[:, None], asking]
    for region, dense in ((runs, cut[0]), (same, cut[1])):
        assert (pairs_of_segments(region) == dense).all()
        assert (region.pairs_of_queries() == dense.sum(2)).all()
    for region, dense in ((whole, expected), (part, expected[:, q0:q1, k0:k1]), (runs, cut[0])):
        counts = region.tiles(16, 8)
        for i, j in np.ndindex(counts.shape[1:]):
            tile = dense[:, i * 16 : i * 16 + 16, j * 8 : j * 8 + 8]
            assert (counts[:, i, j] == tile.sum((1, 2))).all()
            rows, columns = (i * 16, i * 16 + tile.shape[1]), (j * 8, j * 8 + tile.shape[2])
            for b in range(len(tile)):
                assert (region.masked(b, rows, columns).numpy() == tile[b]).all()


def test_region_is_made_once():
    mask = token_mask([[Tree()]], 32)
    assert region_of(mask) is region_of(mask) and region_of(mask, (0, 8)) is region_of(mask, (0, 8), (0, 32))
    assert region_of(mask, (0, 8)) is not region_of(mask)


def test_plans_go_with_the_mask_without_the_garbage_collector():
    gc.disable()
    try:
        mask = token_mask([[Tree((3, 2), (9,), (5, 1, 7))]], 32)
        for region in (region_of(mask), region_of(mask, (16, 32), (0, 8))):
            flash.calls(region, torch.device("cpu")), region.tiles(16, 8)
        kept = [weakref.ref(mask), *map(weakref.ref, mask.regions.values())]
        del mask, region
        assert len(kept) == 3 and not any(ref() for ref in kept)
    finally:
        gc.enable()


def test_pairs_equal_those_that_flops_are_counted_by():
    """Padding counts nothing there, so: without padding."""
    for rule in RULES:
        mask = token_mask([[Tree((3, 2, 4), (9, 9), (5, 1, 7)), Tree((6,)), Tree((2, 0), (30,))]], rule=rule)
        assert region_of(mask).pairs == allowed_pairs(*mask.on_host()[:, 0], rule)


def test_a_branch_before_its_root_is_refused():
    mask = TokenMask(*torch.tensor([[[0, 0, 0, 0]], [[-1, 0, -1, 0]], [[0, 0, 0, 0]]]))
    with pytest.raises(AssertionError, match="token 1 of pack 0 is in a branch of example 0 but comes before token 2"):
        _ = region_of(mask).segments


def test_images_out_of_order_are_refused_only_where_their_order_matters():
    described = torch.tensor([[[0, 0, 0]], [[-1, -1, -1]], [[2, 2, 1]]])
    assert region_of(TokenMask(*described)).pairs == 9
    with pytest.raises(AssertionError, match=r"images of pack 0 are not numbered in their order \(token 2\)"):
        _ = region_of(TokenMask(*described, "within_image")).segments


def test_variable_length_calls_are_few_and_name_no_token_twice():
    """Many examples, many branches, several packs: one causal, one full and one reverse call."""
    trees = [Tree((4, 3, 2), (20, 20), tuple(range(1, 31))), Tree((9,)), Tree((2, 1), (12,), (3, 3))]
    for rule, expected in (("image_tokens", 3), ("within_image", 3), ("none", 2)):
        groups = group_segments(region_of(token_mask([trees, trees[::-1]], rule=rule)))
        assert len(groups) == expected
        for segments in groups:
            assert len({segment.kind == "full" for segment in segments}) == 1
            for name in ("queries", "keys"):
                flat = [(segment.pack, int(t)) for segment in segments for t in getattr(segment, name)]
                assert len(flat) == len(set(flat))


@pytest.mark.parametrize("rule", RULES)
def test_block_lists_of_flex(rule):
    """Every block is skipped, masked or full as the rule says, for the forward's and the backward's lists."""
    trees = [Tree((40, 5, 9), (300, 250), (80, 1, 200)), Tree((200,)), Tree((10, 4), (150,), (33,) * 3)]
    mask = token_mask([trees, [Tree((700,))]], 1400, rule)
    dense = mask.rows(0, 1400).numpy()
    lists = block_lists(region_of(mask).tiles(BLOCK, BLOCK))
    blocks = -(-1400 // BLOCK)
    for b, i, j in np.ndindex(2, blocks, blocks):
        tile = dense[b, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        full = tile.all() and tile.size == BLOCK * BLOCK
        for prefix, listed in (("", tile.any() and not full), ("full_", full)):
            kv, q = lists[f"{prefix}kv_indices"][b, 0, i], lists[f"{prefix}q_indices"][b, 0, j]
            assert (j in kv[: lists[f"{prefix}kv_num_blocks"][b, 0, i]]) == listed
            assert (i in q[: lists[f"{prefix}q_num_blocks"][b, 0, j]]) == listed
            assert sorted(kv) == list(range(blocks)) and sorted(q) == list(range(blocks))
