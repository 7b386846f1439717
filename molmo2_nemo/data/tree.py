"""Message trees: one visual root and many independent conversations about it, flattened into one token sequence.

    [BOS, visual root] [branch 0] [branch 1] ... [branch k-1] EOS

Every branch sees the root and itself; its positions restart where the root ends. Inputs are the sequence without its
last token and labels the sequence without its first; at the end of each branch the label is EOS, weighted like the
label before it. A single conversation is the plain case: no branches, everything belongs to the root.

Weights of a branch with n loss tokens, k branches kept: weight * scale / sqrt(n) / sqrt(k), each factor optional.
In the plain case n counts the final EOS and there is no 1/sqrt(k); in a tree the final EOS is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo2_nemo.data.example import ROOT_BRANCH
from molmo2_nemo.errors import DataError


@dataclass(frozen=True)
class WeightRule:
    """How the loss tokens of an example are weighted."""

    weight: float = 1.0
    root_length: bool = True  # multiply by scale / sqrt(loss tokens of the branch)
    root_branches: bool = True  # divide by sqrt(branches kept)
    scale: float = 2.0

    @classmethod
    def flat(cls, weight: float) -> WeightRule:
        """The same weight for every loss token."""
        return cls(weight, root_length=False, root_branches=False)

    def of(self, loss_tokens: int, branches: int | None) -> float:
        """The weight of one loss token; `branches` is None for a plain example."""
        value = self.weight
        if self.root_length:
            value *= self.scale / math.sqrt(max(loss_tokens, 1))
        if self.root_branches and branches is not None:
            value /= math.sqrt(branches)
        return value


@dataclass(slots=True)
class Branch:
    """One conversation as tokens: (user ids with scaffolding, answer ids) per turn; EOS is added here."""

    turns: list[tuple[list[int], list[int]]]

    def flat(self, eos_id: int) -> tuple[list[int], np.ndarray]:
        """All tokens with EOS after every answer, and a bool [n] that marks the loss tokens (answers and their EOS)."""
        ids: list[int] = []
        marks: list[bool] = []
        for user, answer in self.turns:
            ids += [*user, *answer, eos_id]
            marks += [False] * len(user) + [True] * (len(answer) + 1)
        return ids, np.array(marks, dtype=bool)


@dataclass(slots=True)
class FlatTree:
    """Shifted token arrays of one example; T tokens."""

    input_ids: np.ndarray  # int64 [T]
    labels: np.ndarray  # int64 [T]
    loss_weights: np.ndarray  # float32 [T]
    position_ids: np.ndarray  # int64 [T]
    branch_ids: np.ndarray  # int64 [T], ROOT_BRANCH or the branch's number
    kept: int  # branches
    dropped: int  # branches without a loss token within the limit
    cut: int  # tokens cut off at the end

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


def flatten(
    root_ids: Sequence[int],
    branches: Sequence[Branch],
    *,
    eos_id: int,
    rule: WeightRule | Sequence[WeightRule],
    max_tokens: int | None = None,
) -> FlatTree:
    """Flatten a root and its branches, in the order given, into at most `max_tokens` inputs.

    Args:
        root_ids: BOS and everything that all branches see.
        rule: one weight rule, or one per branch.
    Raises:
        DataError: a root longer than `max_tokens`, or no loss token left within it.
    """
    if not branches or not root_ids:
        raise AssertionError(f"a message tree needs a root and a branch, got {len(root_ids)} and {len(branches)}")
    rules = [rule] * len(branches) if isinstance(rule, WeightRule) else list(rule)
    if len(rules) != len(branches):
        raise AssertionError(f"{len(rules)} weight rules for {len(branches)} branches")
    if max_tokens is not None and len(root_ids) > max_tokens:
        raise DataError(
            f"the images or frames take {len(root_ids)} tokens, more than the {max_tokens} of a sequence; "
            "use fewer crops or frames, or a longer sequence"
        )
    if len(branches) == 1:
        tree = _plain(root_ids, branches[0], eos_id, rules[0])
    else:
        tree = _tree(root_ids, branches, eos_id, rules, max_tokens)
    return tree if max_tokens is None else _truncate(tree, max_tokens)


def _plain(root_ids: Sequence[int], branch: Branch, eos_id: int, rule: WeightRule) -> FlatTree:
    ids, marks = branch.flat(eos_id)
    sequence = np.array([*root_ids, *ids], dtype=np.int64)
    count = len(sequence) - 1
    weights = np.zeros(len(sequence), np.float32)
    weights[len(root_ids) :][marks] = rule.of(int(marks.sum()), None)
    return FlatTree(
        input_ids=sequence[:-1],
        labels=sequence[1:],
        loss_weights=weights[1:],
        position_ids=np.arange(count),
        branch_ids=np.full(count, ROOT_BRANCH, np.int64),
        kept=1,
        dropped=0,
        cut=0,
    )


def _tree(
    root_ids: Sequence[int],
    branches: Sequence[Branch],
    eos_id: int,
    rules: Sequence[WeightRule],
    max_tokens: int | None,
) -> FlatTree:
    flat = [branch.flat(eos_id) for branch in branches]
    kept = _branches_within(len(root_ids), flat, max_tokens)
    ids = [np.array(root_ids, dtype=np.int64)]
    labels = [np.append(ids[0][1:], flat[0][0][0])]
    weights = [np.zeros(len(root_ids), np.float32)]
    positions = [np.arange(len(root_ids))]
    owners = [np.full(len(root_ids), ROOT_BRANCH, np.int64)]
    for number in range(kept):
        tokens, marks = np.array(flat[number][0], dtype=np.int64), flat[number][1]
        # The last of `tokens` is the EOS: only a label. It takes the weight of the label before it.
        weight = np.where(marks, rules[number].of(int(marks.sum()) - 1, kept), 0).astype(np.float32)[1:]
        weight[-1] = weight[-2] if len(weight) > 1 else 0
        ids.append(tokens[:-1])
        labels.append(tokens[1:])
        weights.append(weight)
        positions.append(np.arange(len(root_ids), len(root_ids) + len(weight)))
        owners.append(np.full(len(weight), number, np.int64))
    return FlatTree(
        input_ids=np.concatenate(ids),
        labels=np.concatenate(labels),
        loss_weights=np.concatenate(weights),
        position_ids=np.concatenate(positions),
        branch_ids=np.concatenate(owners),
        kept=kept,
        dropped=len(branches) - kept,
        cut=0,
    )


def _branches_within(root: int, flat: Sequence[tuple[list[int], np.ndarray]], max_tokens: int | None) -> int:
    """How many branches to keep: those before the first whose first loss token would lie at or beyond `max_tokens`."""
    if max_tokens is None:
        return len(flat)
    used = root
    for number, (ids, marks) in enumerate(flat):
        if number and used + int(np.argmax(marks)) >= max_tokens:
            return number
        used += len(ids) - 1
    return len(flat)


def _truncate(tree: FlatTree, max_tokens: int) -> FlatTree:
    cut = max(tree.num_tokens - max_tokens, 0)
    result = FlatTree(
        input_ids=tree.input_ids[:max_tokens],
        labels=tree.labels[:max_tokens],
        loss_weights=tree.loss_weights[:max_tokens],
        position_ids=tree.position_ids[:max_tokens],
        branch_ids=tree.branch_ids[:max_tokens],
        kept=tree.kept,
        dropped=tree.dropped,
        cut=cut,
    )
    if cut and not np.any(result.loss_weights > 0):
        raise DataError(
            f"no answer begins within the {max_tokens} tokens of a sequence (the example has {tree.num_tokens}); "
            "use fewer crops or frames, a shorter prompt, or a longer sequence"
        )
    return result
