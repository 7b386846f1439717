"""Random trees through flatten and collate: the mask equals the published formula, pair by pair.

The oracle is the released code's own encoding, which ours does not use: a subsegment number per token, 10000 for a root
and b for branch b, 100000 more for each example of the pack, and

    allowed(q, k) = (k <= q or (both visual and the same example)) and subsegment(q) <= subsegment(k)
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.data.collate import collate
from molmo2_nemo.data.example import PAD_EXAMPLE, Example
from molmo2_nemo.data.special_tokens import image_numbers
from molmo2_nemo.data.tree import Branch, WeightRule, flatten

torch.set_num_threads(1)
V = 100  # base vocabulary; <im_start> V, <im_end> V+1, <im_patch> V+2, <low_res_im_start> V+4
BOS = EOS = 0
TREES = st.tuples(st.integers(0, 4), st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=4))


def example(visual, branches, key):
    """`visual` patches between markers, one exchange per branch of (user tokens, answer tokens)."""
    root = [BOS, *([V + 4, *[V + 2] * visual, V + 1] if visual else [])]
    tree = flatten(
        root, [Branch([([5] * user, [7] * answer)]) for user, answer in branches], eos_id=EOS, rule=WeightRule()
    )
    return Example(
        input_ids=tree.input_ids,
        labels=tree.labels,
        loss_weights=tree.loss_weights,
        position_ids=tree.position_ids,
        branch_ids=tree.branch_ids,
        visual=tree.input_ids >= V,
        crops=np.zeros((int(visual > 0), 4, 3), np.uint8),
        pooling=np.zeros((visual, 1), np.int64),
        unit_crops=np.array([1] * (visual > 0), np.int64),
        unit_pooled_tokens=np.array([visual] * (visual > 0), np.int64),
        key=key,
    )


def published(visual, branches, number):
    """Subsegments of an example's tokens as laid out by hand: root, then each branch with its answer's end."""
    root = 1 + (visual + 2 if visual else 0)
    if len(branches) == 1:
        return [100000 * number] * (root + sum(branches[0]))  # the final EOS is a label only
    marks = [10000] * root
    for b, (user, answer) in enumerate(branches):
        marks += [b] * (user + answer)
    return [mark + 100000 * number for mark in marks]


@settings(max_examples=60, deadline=None)
@given(st.lists(TREES, min_size=1, max_size=4), st.integers(0, 5))
def test_masks_of_random_packs(trees, padding):
    examples = [example(visual, branches, str(i)) for i, (visual, branches) in enumerate(trees)]
    marks = [mark for i, (visual, branches) in enumerate(trees) for mark in published(visual, branches, i)]
    used = sum(e.num_tokens for e in examples)
    assert used == len(marks)
    batch = collate([examples], sequence_length=used + padding, im_patch_id=V + 2)
    ids = torch.from_numpy(batch.input_ids)
    mask = TokenMask(
        torch.from_numpy(batch.example_ids),
        torch.from_numpy(batch.branch_ids),
        image_numbers(ids, torch.from_numpy(batch.visual), V),
    )
    found = mask.rows(0, used + padding)[0].numpy()
    visual = batch.input_ids[0] >= V
    for q in range(used):
        for k in range(used):
            both = visual[q] and visual[k] and marks[q] // 100000 == marks[k] // 100000
            assert found[q, k] == ((k <= q or both) and marks[q] <= marks[k]), (q, k)
    assert not found[:used, used:].any() and not found[used:, :used].any()
    assert (batch.example_ids[0, used:] == PAD_EXAMPLE).all() and found[used:, used:].any(1).all()
