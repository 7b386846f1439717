"""Packs dealt to blocks of ranks: everybody agrees, nothing is lost, the loader's state ends each rank's step."""

from __future__ import annotations

import numpy as np
import pytest

from molmo2_nemo.data.example import Batch
from molmo2_nemo.model.config import preset
from molmo2_nemo.parallel.dynamic import DynamicSettings


def batch(tokens: int, size: int = 4096, step: int = 0) -> Batch:
    """A plain example of so many tokens in a pack of `size`."""
    real = np.arange(size)[None] < tokens
    none = np.zeros(0, np.int64)
    return Batch(
        input_ids=np.where(real, 7, -1),
        labels=np.where(real, 7, -1),
        loss_weights=real.astype(np.float32),
        position_ids=np.arange(size)[None] * real,
        example_ids=np.where(real, 0, -1),
        branch_ids=np.full((1, size), -1),
        visual=np.zeros((1, size), bool),
        crops=np.zeros((0, 1, 1), np.uint8),
        pooling=np.zeros((0, 1), np.int64),
        pooled_positions=none,
        unit_crops=none,
        unit_rows=none,
        state={"step": step},
    )


def taken(lengths: list[int], most_tokens: int, ranks: int = 8, multiple_of_two: bool = False) -> list[list[Batch]]:
    """What every rank of a context group gets of a step; the state changes with its last micro-batch."""
    settings = DynamicSettings(most_tokens, sequence=multiple_of_two)
    batches = [batch(n, step=int(i == len(lengths) - 1)) for i, n in enumerate(lengths)]
    contexts = [settings.of_rank(preset("8b"), 2, ranks, rank) for rank in range(ranks)]
    turns = contexts[0].plan(batches)
    assert contexts[-1].plan(batches) == turns  # whichever rank is asked
    return [context.take(batches, turns) for context in contexts]


@pytest.mark.parametrize("most_tokens", [512, 2048, 4096])
def test_every_token_is_worked_on_once(most_tokens):
    lengths = [4096, 300, 1000, 4000, 256, 257, 3000, 90]
    of_ranks = taken(lengths, most_tokens)
    shares = [(b.example_ids >= 0).sum() / b.context_ranks for mine in of_ranks for b in mine]
    assert sum(shares) == sum(lengths)
    for mine in of_ranks:
        assert mine and [b.state["step"] for b in mine] == [0] * (len(mine) - 1) + [1]
        for b in mine:
            used, length = int((b.example_ids >= 0).sum()), b.input_ids.shape[1]
            assert length % b.context_ranks == 0 and used <= length < used + b.context_ranks
            assert length / b.context_ranks <= most_tokens
    assert len({b.context_ranks for mine in of_ranks for b in mine}) > 1


def test_shares_are_cut_again_by_sequence_parallelism():
    for mine in taken([1001, 333, 1, 77], 2048, ranks=2, multiple_of_two=True):
        assert all(b.input_ids.shape[1] % (2 * b.context_ranks) == 0 for b in mine)


def test_one_pack_is_shared_by_all():
    assert [[b.context_ranks for b in mine] for mine in taken([4096], 4096)] == [[8]] * 8
