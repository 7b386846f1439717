"""Crop planning: every crop is encoded once, in runs as even as they can be; every pooled token reaches the ranks and
the place that it is added to, its gradient comes back once, and fewer bytes travel than in an all-gather."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.parallel.crops import CropPlan, VisionRanks, VisionUnits, plan_crops, send_to_owners, tie_parameters
from molmo2_nemo.parallel.partition import even_runs
from tests.support.light import run_light
from tests.support.traffic import vision_all_gather_bytes

torch.set_num_threads(1)


@st.composite
def batches(draw):
    """Random units over random packs: (unit_crops, unit_pooled, positions, S, B, context ranks), and the rest."""
    cp, tensor, packs = (
        draw(st.sampled_from([1, 2, 3, 4, 8])),
        draw(st.sampled_from([1, 1, 2])),
        draw(st.integers(1, 3)),
    )
    sequence = draw(st.booleans())
    size = cp * tensor * draw(st.integers(2, 12))
    crops = draw(st.lists(st.integers(1, 9), max_size=12))
    rows = [draw(st.integers(0, 6)) for _ in crops]
    while sum(rows) > size * packs:
        rows[rows.index(max(rows))] -= 1
    positions = draw(st.permutations(range(size * packs)))[: sum(rows)]
    as_tensor = [torch.tensor(x, dtype=torch.int64) for x in (crops, rows, sorted(positions))]
    rest = {"tensor": tensor, "sequence": sequence, "pooled_cost": 0.1, "chunk": draw(st.sampled_from([None, 1, 4]))}
    return (*as_tensor, size, packs, cp), rest


def plan_of(
    unit_crops,
    unit_pooled,
    positions,
    size,
    packs,
    context,
    rank,
    *,
    tensor=1,
    sequence=False,
    pooled_cost=0.0,
    chunk=None,
) -> CropPlan:
    """A crop costs 1, a pooled token `pooled_cost`."""
    costs = (unit_crops + unit_pooled * pooled_cost).numpy()
    units = VisionUnits(unit_crops, unit_pooled, costs, positions, packs, size)
    return plan_crops(units, VisionRanks(context, tensor, rank, sequence), chunk)


def plans(batch, rest) -> list[CropPlan]:
    return [plan_of(*batch, rank, **rest) for rank in range(batch[-1] * rest["tensor"])]


@settings(max_examples=200, deadline=None)
@given(batches())
def test_every_token_arrives_where_it_belongs(case):
    (unit_crops, unit_pooled, positions, size, packs, cp), rest = case
    found = plans(*case)
    copies = 1 if rest["sequence"] else rest["tensor"]
    # crops and rows: consecutive runs that cover everything, cut between units
    for kind, sizes in (("crops", unit_crops), ("pooled_tokens", unit_pooled)):
        runs = [getattr(p, kind) for p in found]
        assert [r.start for r in runs] + [int(sizes.sum())] == [0] + [r.stop for r in runs]
    ends = {0, *np.cumsum(unit_crops.tolist()).tolist()}
    assert all(p.crops.start in ends for p in found)
    # what is sent is what is expected, in the order in which the receiver expects it
    rows = [torch.arange(p.pooled_tokens.start, p.pooled_tokens.stop)[p.send_order] for p in found]
    local = size * copies // len(found)
    for receiver, plan in enumerate(found):
        arriving = []
        for sender, other in enumerate(found):
            start = sum(other.send_counts[:receiver])
            arriving += rows[sender][start : start + other.send_counts[receiver]].tolist()
            assert other.send_counts[receiver] == plan.receive_counts[sender]
            assert other.returning[receiver] == plan.returning[sender]
        for row, target in zip(arriving, plan.targets.tolist(), strict=True):
            t, b = divmod(target, packs)  # targets index [T, B]
            assert b * size + receiver // copies * local + t == int(positions[row])
    assert sum(len(p.targets) for p in found) == len(positions) * copies
    for plan in found:  # every row's gradient is returned by exactly one of the ranks that have it
        parts = plan.send_order.split(plan.send_counts)
        back = [row for part, r in zip(parts, plan.returning, strict=True) if r for row in part.tolist()]
        assert sorted(back) == list(range(plan.pooled_tokens.stop - plan.pooled_tokens.start))


@settings(max_examples=100, deadline=None)
@given(batches())
def test_pieces_are_the_run(case):
    (unit_crops, *_), rest = case
    for plan in plans(*case):
        crops, rows = zip(*plan.chunks, strict=True) if plan.chunks else ((), ())
        for kind, whole in ((crops, plan.crops), (rows, plan.pooled_tokens)):
            ends = [whole.start, *(piece.stop for piece in kind)]
            assert [piece.start for piece in kind] == ends[:-1] and (not kind or ends[-1] == whole.stop)
        if rest["chunk"] is not None:
            assert all(c.stop - c.start <= max(rest["chunk"], int(unit_crops.max())) for c in crops)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=9), st.integers(1, 5))
def test_runs_are_as_even_as_contiguous_runs_can_be(costs, ranks):
    def largest(bounds):
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))

    bounds = even_runs(np.array(costs, np.int64), ranks)
    assert bounds[0] == 0 and bounds[-1] == len(costs) and bounds == sorted(bounds)
    cuts = itertools.combinations_with_replacement(range(len(costs) + 1), ranks - 1)
    assert largest(bounds) == min(largest((0, *cut, len(costs))) for cut in cuts)


def counted_all_to_all(sent: list[int]) -> None:
    """Count the bytes that leave this rank in all-to-alls from now on."""
    import torch.distributed as dist

    original = dist.all_to_all_single

    def counted(output, given, output_splits=None, input_splits=None, group=None):
        counts = [n for rank, n in enumerate(input_splits) if rank != dist.get_rank(group)]
        sent.append(sum(counts) * given[:1].nelement() * given.element_size() if len(given) else 0)
        return original(output, given, output_splits, input_splits, group=group)

    dist.all_to_all_single = counted


def exchange_job(cases: list[tuple]) -> list[tuple]:
    """Rows marked with their number go round and come back as gradients marked with the receiver's targets."""
    group = torch.distributed.group.WORLD
    rank, out, sent = torch.distributed.get_rank(), [], []
    counted_all_to_all(sent)
    for batch, rest in cases:
        plan = plan_of(*batch, rank, **rest)
        rows = (
            torch.arange(plan.pooled_tokens.start, plan.pooled_tokens.stop)
            .float()[:, None]
            .repeat(1, 2)
            .requires_grad_()
        )
        received = send_to_owners(rows, plan, group)
        # without sequence parallelism tensor ranks have equal gradients
        number = rank // (1 if rest["sequence"] else rest["tensor"])
        (received * (1 + plan.targets + 1000 * number)[:, None]).sum().backward()
        out.append((received.detach(), rows.grad, sent[-2:]))
    return out


def exchange_cases() -> list[tuple]:
    """Random packs on 4 x 1 and 2 x 2 ranks; the last is one video whose frames lie evenly over the sequence."""
    generator, cases = np.random.default_rng(0), []
    for number in range(12):
        crops = generator.integers(1, 6, int(generator.integers(0, 7)))
        rows = generator.integers(0, 5, len(crops))
        positions = np.sort(generator.permutation(2 * 32)[: rows.sum()])
        tensor = 1 + number % 2
        rest = {"tensor": tensor, "sequence": number % 4 == 1}
        cases.append(((*(torch.from_numpy(x).long() for x in (crops, rows, positions)), 32, 2, 4 // tensor), rest))
    frames = torch.ones(40, dtype=torch.int64)
    positions = torch.arange(400)[torch.arange(400) % 10 < 9]  # nine pooled tokens of a frame, one of its timestamp
    cases.append(((frames, frames * 9, positions, 400, 1, 4), {"tensor": 1, "sequence": False}))
    return cases


def test_exchange_and_its_gradient():
    cases = exchange_cases()
    results = run_light(exchange_job, cases, ranks=4)
    for i, (batch, rest) in enumerate(cases):
        _, _, positions, size, packs, cp = batch
        copies = 1 if rest["sequence"] else rest["tensor"]
        local = size // (4 // copies)
        grads = torch.cat([results[r][i][1] for r in range(4)])[:, 0].tolist()
        for rank in range(4):
            plan = plan_of(*batch, rank, **rest)
            for value, target in zip(results[rank][i][0][:, 0].tolist(), plan.targets.tolist(), strict=True):
                t, b = divmod(target, packs)
                assert int(positions[int(value)]) == b * size + rank // copies * local + t
                assert grads[int(value)] == 1 + target + 1000 * (rank // copies)


def test_bytes_against_an_all_gather():
    """Counted at the collective: never more than if everybody got every pooled token; next to nothing for a video."""
    cases = exchange_cases()
    results = run_light(exchange_job, cases, ranks=4)
    for i, (batch, _) in enumerate(cases):
        everything = vision_all_gather_bytes(len(batch[2]), 2, 4, 4)
        forward, backward = (sum(results[rank][i][2][way] for rank in range(4)) for way in (0, 1))
        assert forward <= everything and backward <= forward
    assert forward <= 0.03 * everything  # the last case: frames are encoded where their tokens are


def test_tied_parameters_get_zero_gradients():
    linear = torch.nn.Linear(3, 2)
    linear.bias.requires_grad_(False)
    x = torch.zeros(0, 4, requires_grad=True)
    tie_parameters(x, linear).sum().backward()
    assert linear.weight.grad.shape == (2, 3) and not linear.weight.grad.any()
    assert linear.bias.grad is None
