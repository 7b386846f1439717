"""Crop planning: every crop is encoded once, every pooled token reaches the rank and the place that it is added to."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.parallel.crops import CropPlan, exchange, plan_crops, tie_parameters

torch.set_num_threads(1)


@st.composite
def batches(draw):
    """Random units over random packs: (unit_crops, unit_rows, pooled_positions, S, B, context size)."""
    cp, packs = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(1, 3))
    size = cp * draw(st.integers(2, 12))
    crops = draw(st.lists(st.integers(1, 9), max_size=12))
    rows = [draw(st.integers(0, 6)) for _ in crops]
    while sum(rows) > size * packs:
        rows[rows.index(max(rows))] -= 1
    positions = draw(st.permutations(range(size * packs)))[: sum(rows)]
    as_tensor = [torch.tensor(x, dtype=torch.int64) for x in (crops, rows, sorted(positions))]
    return *as_tensor, size, packs, cp


def plans(batch) -> list[CropPlan]:
    return [plan_crops(*batch, rank) for rank in range(batch[-1])]


@settings(max_examples=150, deadline=None)
@given(batches())
def test_every_token_arrives_once(batch):
    unit_crops, unit_rows, positions, size, packs, cp = batch
    found = plans(batch)
    # crops and rows: consecutive runs that cover everything, cut between units
    for kind, sizes in (("crops", unit_crops), ("rows", unit_rows)):
        runs = [getattr(p, kind) for p in found]
        assert [r.start for r in runs] + [int(sizes.sum())] == [0] + [r.stop for r in runs]
    ends = {0, *np.cumsum(unit_crops.tolist()).tolist()} | {0}
    assert all(p.crops.start in ends for p in found)
    # what is sent is what is expected, in the order in which the receiver expects it
    rows = [torch.arange(p.rows.start, p.rows.stop)[p.send_order] for p in found]
    for receiver, plan in enumerate(found):
        arriving = []
        for sender in range(cp):
            start = sum(found[sender].send_counts[:receiver])
            arriving += rows[sender][start : start + found[sender].send_counts[receiver]].tolist()
            assert found[sender].send_counts[receiver] == plan.receive_counts[sender]
        local = size // cp
        for row, target in zip(arriving, plan.targets.tolist(), strict=True):
            t, b = divmod(target, packs)  # targets index [T, B]
            assert b * size + receiver * local + t == int(positions[row])
    assert sum(len(p.targets) for p in found) == len(positions)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_shares_are_even(batch):
    """No run is further from an equal share than the largest unit at its ends."""
    unit_crops, *_, cp = batch
    if not len(unit_crops):
        assert all(p.crops == slice(0, 0) for p in plans(batch))
        return
    share, largest = float(unit_crops.sum()) / cp, int(unit_crops.max())
    for plan in plans(batch):
        assert abs((plan.crops.stop - plan.crops.start) - share) <= largest


def exchange_job(cases: list[tuple]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows marked with their number go round and come back as gradients marked with the receiver's targets."""
    group = torch.distributed.group.WORLD
    rank, out = torch.distributed.get_rank(), []
    for batch in cases:
        plan = plan_crops(*batch, rank)
        rows = torch.arange(plan.rows.start, plan.rows.stop).float()[:, None].repeat(1, 2).requires_grad_()
        received = exchange(rows, plan, group)
        (received * (1 + plan.targets + 1000 * rank)[:, None]).sum().backward()
        out.append((received.detach(), rows.grad))
    return out


def test_exchange_and_its_gradient(workers):
    generator, cp = np.random.default_rng(0), 4
    cases = []
    for _ in range(10):
        crops = generator.integers(1, 6, int(generator.integers(0, 7)))
        rows = generator.integers(0, 5, len(crops))
        positions = np.sort(generator.permutation(2 * 32)[: rows.sum()])
        cases.append((*(torch.from_numpy(x).long() for x in (crops, rows, positions)), 32, 2, cp))
    results = workers.run(exchange_job, cases, ranks=cp)
    for i, batch in enumerate(cases):
        positions = batch[2].tolist()
        grads = torch.cat([results[r][i][1] for r in range(cp)])[:, 0].tolist()
        for rank in range(cp):
            plan = plan_crops(*batch, rank)
            for value, target in zip(results[rank][i][0][:, 0].tolist(), plan.targets.tolist(), strict=True):
                assert positions[int(value)] == target % 2 * 32 + rank * 8 + target // 2
                assert grads[int(value)] == 1 + target + 1000 * rank


def test_tied_parameters_get_zero_gradients():
    linear = torch.nn.Linear(3, 2)
    linear.bias.requires_grad_(False)
    x = torch.zeros(0, 4, requires_grad=True)
    tie_parameters(x, linear).sum().backward()
    assert linear.weight.grad.shape == (2, 3) and not linear.weight.grad.any()
    assert linear.bias.grad is None
