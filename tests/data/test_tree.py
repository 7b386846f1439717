"""Message trees: the executed examples of the reference, and a brute-force walk over random trees."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.data.tree import Branch, WeightRule, flatten

BOS, EOS = 901, 902
GENERIC = WeightRule()


def branch(*turns):
    return Branch([(list(user), list(answer)) for user, answer in turns])


def test_two_branches_with_four_visual_tokens():
    """Reference, section 6: prompts of 9 tokens, answers "ab" and "c"."""
    root = [BOS, 1, 2, 3, 4]
    prompt0, prompt1 = list(range(10, 19)), list(range(20, 29))
    tree = flatten(root, [branch((prompt0, [50, 51])), branch((prompt1, [60]))], eos_id=EOS, rule=GENERIC)
    assert tree.input_ids.tolist() == [*root, *prompt0, 50, 51, *prompt1, 60]
    assert tree.labels.tolist() == [1, 2, 3, 4, *prompt0, 50, 51, EOS, *prompt1[1:], 60, EOS]
    assert tree.branch_ids.tolist() == [-1] * 5 + [0] * 11 + [1] * 10
    assert tree.position_ids.tolist() == [*range(5), *range(5, 16), *range(5, 15)]
    expected = np.zeros(26)
    expected[13:16] = 1.0
    expected[24:26] = math.sqrt(2)
    np.testing.assert_allclose(tree.loss_weights, expected, rtol=1e-6)
    assert tree.loss_weights.dtype == np.float32


def test_the_same_annotation_alone():
    root, prompt = [BOS, 1, 2, 3, 4], list(range(10, 19))
    tree = flatten(root, [branch((prompt, [50, 51]))], eos_id=EOS, rule=GENERIC)
    assert tree.input_ids.tolist() == [*root, *prompt, 50, 51]
    assert tree.labels.tolist() == [*root[1:], *prompt, 50, 51, EOS]
    assert tree.branch_ids.tolist() == [-1] * 16
    assert tree.position_ids.tolist() == list(range(16))
    np.testing.assert_allclose(tree.loss_weights, [0] * 13 + [2 / math.sqrt(3)] * 3, rtol=1e-6)


VISUAL = [BOS, 1, 1, 1, 1, 1, 1]
BRANCHES = [branch(([10, 11, 12], [50, 51, 52])), branch(([20, 21], [60]))]


def test_executed_example():
    """Reference on training, 2.5, with EOS id 2."""
    tree = flatten(VISUAL, BRANCHES, eos_id=2, rule=GENERIC)
    assert tree.input_ids.tolist() == [*VISUAL, 10, 11, 12, 50, 51, 52, 20, 21, 60]
    assert tree.labels.tolist() == [1] * 6 + [10, 11, 12, 50, 51, 52, 2, 21, 60, 2]
    assert tree.position_ids.tolist() == [*range(7), 7, 8, 9, 10, 11, 12, 7, 8, 9]
    assert tree.branch_ids.tolist() == [-1] * 7 + [0] * 6 + [1] * 3
    a, b = 2 / math.sqrt(3) / math.sqrt(2), 2 / math.sqrt(2)
    np.testing.assert_allclose(tree.loss_weights, [0] * 9 + [a] * 4 + [0] + [b] * 2, rtol=1e-6)


def test_overrides_of_the_executed_example():
    flat = flatten(VISUAL, BRANCHES, eos_id=2, rule=WeightRule.flat(0.2)).loss_weights
    np.testing.assert_allclose(flat[flat > 0], [0.2] * 6, rtol=1e-6)
    alone = flatten(VISUAL, BRANCHES[:1], eos_id=2, rule=GENERIC).loss_weights
    np.testing.assert_allclose(alone[alone > 0], [1.0] * 4)
    weighted = flatten(VISUAL, BRANCHES[:1], eos_id=2, rule=WeightRule(1.477)).loss_weights
    np.testing.assert_allclose(weighted[weighted > 0], [1.477] * 4, rtol=1e-6)
    stage1 = flatten(VISUAL, BRANCHES, eos_id=2, rule=WeightRule(1.0, False, False)).loss_weights
    assert set(stage1.tolist()) == {0.0, 1.0}
    paper = flatten(VISUAL, BRANCHES[:1], eos_id=2, rule=WeightRule(scale=4.0)).loss_weights
    np.testing.assert_allclose(paper[paper > 0], [2.0] * 4)
    each = flatten(VISUAL, BRANCHES, eos_id=2, rule=[WeightRule.flat(3), WeightRule.flat(5)]).loss_weights
    assert each[9:13].tolist() == [3] * 4 and each[14:].tolist() == [5] * 2


def test_several_turns_keep_their_eos():
    turns = branch(([10], [50, 51]), ([11, 12], [52]))
    alone = flatten([BOS], [turns], eos_id=EOS, rule=GENERIC)
    assert alone.input_ids.tolist() == [BOS, 10, 50, 51, EOS, 11, 12, 52]
    assert (alone.loss_weights > 0).tolist() == [False, True, True, True, False, False, True, True]
    np.testing.assert_allclose(alone.loss_weights.max(), 2 / math.sqrt(5))
    tree = flatten([BOS], [turns, branch(([13], [53]))], eos_id=EOS, rule=GENERIC)
    assert tree.input_ids.tolist() == [BOS, 10, 50, 51, EOS, 11, 12, 52, 13, 53]
    np.testing.assert_allclose(tree.loss_weights[7], 2 / math.sqrt(4) / math.sqrt(2), rtol=1e-6)


def test_an_empty_answer_teaches_nothing_in_a_tree():
    tree = flatten([BOS], [branch(([10, 11], [])), branch(([12], [50]))], eos_id=EOS, rule=GENERIC)
    assert tree.loss_weights[1:3].tolist() == [0, 0]
    assert np.isfinite(tree.loss_weights).all()


def walk(root, branches, kept, rule):
    """Token by token, straight from the rules: (input, label, weight, position, branch) of every input."""
    rows = []
    for i, token in enumerate(root):
        label = root[i + 1] if i + 1 < len(root) else branches[0].turns[0][0][0]
        rows.append((token, label, 0.0, i, -1))
    for b in range(kept):
        sequence, answers = [], []
        for t, (user, answer) in enumerate(branches[b].turns):
            last = t == len(branches[b].turns) - 1
            reply = answer if last else [*answer, EOS]
            sequence += [*user, *reply]
            answers += [False] * len(user) + [True] * len(reply)
        n = sum(answers)
        w = rule.weight * (rule.scale / math.sqrt(n) if rule.root_length else 1)
        w /= math.sqrt(kept) if rule.root_branches else 1
        for i, token in enumerate(sequence):
            end = i == len(sequence) - 1
            label = EOS if end else sequence[i + 1]
            learned = answers[i] if end else answers[i + 1]
            rows.append((token, label, w if learned else 0.0, len(root) + i, b))
    return rows


tokens = st.lists(st.integers(0, 99), min_size=1, max_size=5)
trees = st.lists(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=3), min_size=2, max_size=6)
rules = st.builds(WeightRule, st.sampled_from([1.0, 0.2, 1.477]), st.booleans(), st.booleans())


@given(tokens, trees, rules)
@settings(max_examples=150, deadline=None)
def test_trees_against_a_walk(root, turns, rule):
    branches = [Branch(t) for t in turns]
    tree = flatten(root, branches, eos_id=EOS, rule=rule)
    rows = walk(root, branches, len(branches), rule)
    for name, column in zip(
        ("input_ids", "labels", "loss_weights", "position_ids", "branch_ids"), zip(*rows, strict=True), strict=True
    ):
        np.testing.assert_allclose(getattr(tree, name), column, rtol=1e-6, err_msg=name)
    assert tree.kept == len(branches) and tree.dropped == tree.cut == 0


@given(tokens, trees, rules, st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_truncated_trees(root, turns, rule, limit):
    branches = [Branch(t) for t in turns]
    if limit < len(root):
        with pytest.raises(ValueError, match=f"more than the {limit} of a sequence"):
            flatten(root, branches, eos_id=EOS, rule=rule, max_tokens=limit)
        return
    kept, used = 1, len(root) + length(branches[0])
    while kept < len(branches) and used + len(branches[kept].turns[0][0]) < limit:
        used += length(branches[kept])
        kept += 1
    rows = walk(root, branches, kept, rule)
    if not any(row[2] for row in rows[:limit]):
        with pytest.raises(ValueError, match="no answer begins"):
            flatten(root, branches, eos_id=EOS, rule=rule, max_tokens=limit)
        return
    tree = flatten(root, branches, eos_id=EOS, rule=rule, max_tokens=limit)
    assert (tree.kept, tree.dropped) == (kept, len(branches) - kept)
    assert tree.cut == max(len(rows) - limit, 0)
    assert tree.num_tokens == min(len(rows), limit)
    np.testing.assert_allclose(tree.loss_weights, [row[2] for row in rows[:limit]], rtol=1e-6)


def length(one):
    return sum(len(user) + len(answer) + 1 for user, answer in one.turns) - 1


def test_misuse():
    with pytest.raises(AssertionError, match="needs a root and a branch"):
        flatten([BOS], [], eos_id=EOS, rule=GENERIC)
    with pytest.raises(AssertionError, match="1 weight rules for 2 branches"):
        flatten([BOS], BRANCHES, eos_id=EOS, rule=[GENERIC])
