"""Collation: every offset checked by following it back to the example it came from."""

import numpy as np
import pytest

from molmo2_nemo.data.collate import check_example, collate
from molmo2_nemo.data.example import PAD_EXAMPLE, PAD_TOKEN, ROOT_BRANCH, Example
from molmo2_nemo.errors import DataError

PATCH, IM = 5, 77  # patches per crop, id of <im_patch>
rng = np.random.default_rng(0)


def example(text, units=(), window=4, key="k"):
    """`units`: (crops, rows) each; row r of the example points at random patches of its unit."""
    rows = sum(r for _, r in units)
    total = text + rows
    ids = rng.integers(0, 70, total)
    ids[rng.permutation(total)[:rows]] = IM
    crops = sum(c for c, _ in units)
    pooling = np.concatenate(
        [np.zeros((0, window), np.int64)] + [rng.integers(-1, crops * PATCH, (r, window)) for _, r in units]
    )
    branches = np.sort(rng.integers(-1, 2, total))
    return Example(
        input_ids=ids,
        labels=rng.integers(0, 70, total),
        loss_weights=rng.random(total, np.float32),
        position_ids=np.arange(total),
        branch_ids=branches,
        visual=ids == IM,
        crops=rng.integers(0, 255, (crops, PATCH, 3)).astype(np.uint8),
        pooling=pooling,
        unit_crops=np.array([c for c, _ in units], np.int64),
        unit_pooled_tokens=np.array([r for _, r in units], np.int64),
        key=key,
    )


def test_every_value_can_be_followed_back():
    packs = [
        [example(6, [(2, 3)], key="a"), example(4, key="b"), example(5, [(1, 2), (3, 4)], window=9, key="c")],
        [example(7, key="d")],
        [example(3, [(1, 1)], window=4, key="e")],
    ]
    for pack in packs:
        for e in pack:
            check_example(e, IM)
    batch = collate(packs, sequence_length=32, im_patch_id=IM)
    assert batch.keys == [["a", "b", "c"], ["d"], ["e"]]
    assert batch.pooling.shape[1] == 9
    patches = batch.crops.reshape(-1, 3)
    row = 0
    for b, pack in enumerate(packs):
        start = 0
        for number, e in enumerate(pack):
            at = slice(start, start + e.num_tokens)
            for name in ("input_ids", "labels", "loss_weights", "position_ids", "branch_ids", "visual"):
                np.testing.assert_array_equal(getattr(batch, name)[b, at], getattr(e, name))
            assert (batch.example_ids[b, at] == number).all()
            own = e.crops.reshape(-1, 3)
            for r, where in enumerate(np.flatnonzero(e.input_ids == IM)):
                assert batch.pooled_positions[row] == b * 32 + start + where
                got = batch.pooling[row]
                assert (got >= 0).sum() == (e.pooling[r] >= 0).sum()
                np.testing.assert_array_equal(patches[got[got >= 0]], own[e.pooling[r][e.pooling[r] >= 0]])
                row += 1
            start = at.stop
        assert (batch.input_ids[b, start:] == PAD_TOKEN).all() and (batch.labels[b, start:] == PAD_TOKEN).all()
        assert (batch.example_ids[b, start:] == PAD_EXAMPLE).all() and not batch.visual[b, start:].any()
        assert (batch.loss_weights[b, start:] == 0).all() and (batch.branch_ids[b, start:] == ROOT_BRANCH).all()
    assert row == len(batch.pooling) == batch.unit_pooled_tokens.sum()
    assert batch.unit_crops.tolist() == [2, 1, 3, 1] and batch.unit_crops.sum() == len(batch.crops)


def test_text_only():
    batch = collate([[example(3)], [example(4)]], sequence_length=8, im_patch_id=IM)
    assert batch.crops.shape == (0, PATCH, 3) and batch.pooling.shape[0] == 0 and batch.pooled_positions.shape == (0,)
    assert batch.unit_crops.dtype == np.int64 and batch.unit_pooled_tokens.shape == (0,)


def test_exact_fit_and_overflow():
    packs = [[example(5, key="first"), example(3, key="second")]]
    assert (collate(packs, sequence_length=8, im_patch_id=IM).input_ids >= 0).all()
    with pytest.raises(DataError, match="8 tokens does not fit into 7 .*first, second"):
        collate(packs, sequence_length=7, im_patch_id=IM)


def test_checks():
    cases = {
        "pooled tokens": lambda e: setattr(e, "pooling", e.pooling[:-1]),
        "outside": lambda e: e.pooling.__setitem__((0, 0), 2 * PATCH),
        "units hold": lambda e: setattr(e, "unit_crops", np.array([1])),
        "labels has shape": lambda e: setattr(e, "labels", e.labels[1:]),
        "not finite": lambda e: e.loss_weights.__setitem__(0, np.nan),
    }
    for words, damage in cases.items():
        e = example(4, [(2, 3)])
        check_example(e, IM)
        damage(e)
        with pytest.raises(DataError, match=words):
            check_example(e, IM)
