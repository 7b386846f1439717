"""Packs assigned to blocks of ranks: everybody agrees, nothing is lost, the loader's state ends each rank's step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from molmo2_nemo.cost.context import ContextCost
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.cost.step import StepCost
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.example import Batch
from molmo2_nemo.model.config import preset
from molmo2_nemo.parallel.dynamic import DynamicContext
from molmo2_nemo.settings.layout import crop_limit
from molmo2_nemo.settings.run import ParallelConfig


def batch(tokens: int, size: int = 4096, step: int = 0, units: tuple[int, ...] = ()) -> Batch:
    """A plain example of so many tokens in a pack of `size`, with units of so many crops, one token each."""
    real = np.arange(size)[None] < tokens
    unit_crops = np.array(units, np.int64)
    return Batch(
        input_ids=np.where(real, 7, -1),
        labels=np.where(real, 7, -1),
        loss_weights=real.astype(np.float32),
        position_ids=np.arange(size)[None] * real,
        example_ids=np.where(real, 0, -1),
        branch_ids=np.full((1, size), -1),
        visual=np.zeros((1, size), bool),
        crops=np.zeros((unit_crops.sum(), 1, 1), np.uint8),
        pooling=np.zeros((len(units), 1), np.int64),
        pooled_positions=np.arange(len(units)),
        unit_crops=unit_crops,
        unit_pooled_tokens=np.ones_like(unit_crops),
        state={"step": step},
    )


def of_rank(
    size: int, rank: int, context_tokens: int, context_crops: int | None = None, *, tensor: int = 1, multiple: int = 1
) -> DynamicContext:
    """For the 8B."""
    cost = ContextCost(StepCost(preset("8b")), Layout(tensor=tensor))
    return DynamicContext(cost, size, rank, context_tokens, context_crops, multiple)


def taken(lengths: list[int], context_tokens: int, ranks: int = 8, multiple_of_two: bool = False) -> list[list[Batch]]:
    """What every rank of a context group gets of a step; the state changes with its last micro-batch."""
    batches = [batch(n, step=int(i == len(lengths) - 1)) for i, n in enumerate(lengths)]
    multiple = 2 if multiple_of_two else 1
    contexts = [of_rank(ranks, rank, context_tokens, tensor=2, multiple=multiple) for rank in range(ranks)]
    assignments = contexts[0].plan(batches)
    assert contexts[-1].plan(batches) == assignments  # whichever rank is asked
    return [context.take(batches, assignments) for context in contexts]


@pytest.mark.parametrize("context_tokens", [512, 2048, 4096])
def test_every_token_is_worked_on_once(context_tokens):
    lengths = [4096, 300, 1000, 4000, 256, 257, 3000, 90]
    of_ranks = taken(lengths, context_tokens)
    shares = [(b.example_ids >= 0).sum() / b.context_ranks for mine in of_ranks for b in mine]
    assert sum(shares) == sum(lengths)
    for mine in of_ranks:
        assert mine and [b.state["step"] for b in mine] == [0] * (len(mine) - 1) + [1]
        for b in mine:
            used, length = int((b.example_ids >= 0).sum()), b.input_ids.shape[1]
            assert length % b.context_ranks == 0 and used <= length < used + b.context_ranks
            assert length / b.context_ranks <= context_tokens
    assert len({b.context_ranks for mine in of_ranks for b in mine}) > 1


def test_shares_are_cut_again_by_sequence_parallelism():
    for mine in taken([1001, 333, 1, 77], 2048, ranks=2, multiple_of_two=True):
        assert all(b.input_ids.shape[1] % (2 * b.context_ranks) == 0 for b in mine)


def test_one_pack_is_shared_by_all():
    assert [[b.context_ranks for b in mine] for mine in taken([4096], 4096)] == [[8]] * 8


@pytest.mark.parametrize(("length", "ranks"), [(4096, 1), (8192, 2), (16384, 4), (32768, 8)])
def test_a_step_of_each_length_is_shared_by_its_ranks(length, ranks):
    """32,768 tokens in packs of one length (data.lengths), though any rank has memory for any of them."""
    batches = [batch(length, length) for _ in range(32768 // length)]
    context = of_rank(8, 0, 32768)
    assert {each.size for each in context.plan(batches)} == {ranks}


def most_crops_of_a_rank(units: list[tuple[int, ...]], context_crops: int | None, tokens: int = 2000) -> list[int]:
    """Of each pack, on 8 ranks that have memory for all its tokens."""
    context = of_rank(8, 0, 4096, context_crops)
    batches = [batch(tokens + n, units=of_pack) for n, of_pack in enumerate(units)]
    assignments = context.plan(batches)
    counts = {each.number: PackCounts.of(batches[each.number]) for each in assignments}
    return [context.cost.crops_of_rank(counts[t.number], t.size) for t in sorted(assignments, key=lambda t: t.number)]


def test_no_rank_gets_more_crops_than_it_may():
    """Sixteen equal packs would go to one rank each, with eight times the crops of a static share."""
    units = [(1,) * 128] * 16
    assert most_crops_of_a_rank(units, None) == [128] * 16
    assert most_crops_of_a_rank(units, 16) == [16] * 16
    for limit in (32, 64):
        assert max(most_crops_of_a_rank(units, limit)) <= limit
    mixed = [(9,) * 14, (1,) * 40, (), (5, 5, 5, 5)] * 4
    assert max(most_crops_of_a_rank(mixed, 27)) <= 27
    # 25 crops of one image are one rank's under any layout, and no reason to share the pack
    assert most_crops_of_a_rank([(25,)] * 16, 16) == [25] * 16


def test_a_micro_batch_of_two_packs_may_have_twice_the_crops():
    one = batch(2000, units=(1,) * 32)
    names = ("input_ids", "labels", "loss_weights", "position_ids", "example_ids", "branch_ids", "visual")
    both = replace(one, **{name: np.repeat(getattr(one, name), 2, axis=0) for name in names})
    context = of_rank(8, 0, 4096, 16)
    assert not context.fits(PackCounts.of(one), 1) and context.fits(PackCounts.of(both), 1)


def test_packs_without_a_token_are_assigned():
    taken_by = taken([0, 0, 0, 0, 4096], 4096, ranks=4)
    assert all(mine for mine in taken_by)
    assert sum((b.example_ids >= 0).sum() / b.context_ranks for mine in taken_by for b in mine) == 4096


@pytest.mark.parametrize(
    ("settings", "chunk", "limit"),
    [
        ({"context": 8}, None, 16),
        ({"context": 8, "tensor": 2}, None, 8),
        ({"context": 6}, None, 22),
        ({"context": 8}, 16, None),
        ({"context": 8, "context_crops": 64}, None, 64),
        ({"context": 8, "context_crops": 64}, 16, 64),
    ],
)
def test_limit_of_crops(settings, chunk, limit):
    """Unless set, a static share of a full pack; chunks bound memory themselves."""
    assert crop_limit(ParallelConfig(**settings), 128, chunk) == limit
