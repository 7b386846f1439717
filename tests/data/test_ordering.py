"""Windows in order of cost: what order, nothing lost or repeated, exact and elastic resume, phases."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from molmo2_nemo.data.balance import CostModel, spread
from molmo2_nemo.data.config import DataConfig, PackingConfig, PhaseConfig, SourceConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.ordering import CostOrder
from molmo2_nemo.data.shard_writer import write_shards

from .test_loader import IM, FakeBuilder, records, same, take, used

COST = CostModel(
    token=1e6, pair=1e5, crop=5e6, pooled_token=0, window_position=0, score=0
)  # small packs, visible differences


@pytest.fixture
def config(tmp_path):
    write_shards(tmp_path / "one", records(i % 90 for i in range(400)), records_per_shard=100)
    return DataConfig(
        sources={"one": SourceConfig(str(tmp_path / "one"))},
        packing=PackingConfig(sequence_length=128, max_crops=6, buffer_size=7),
    )


def stream(config, rank=0, size=1):
    builder = FakeBuilder()
    return PackStream(config, micro_batch_size=1, dp_rank=rank, dp_size=size, builder=builder, im_patch_id=IM)


def ordered(config, rank=0, size=1, window=4):
    return CostOrder(stream(config, rank, size), window, COST)


def copy(states):
    return json.loads(json.dumps(states))


def costs(batches):
    return [COST.of(batch) for batch in batches]


def test_windows_hold_the_same_packs_heaviest_first(config):
    plain, got = take(stream(config), 12), take(ordered(config), 12)
    for start in range(0, 12, 4):
        window = sorted(plain[start : start + 4], key=COST.of, reverse=True)
        assert costs(got[start : start + 4]) == costs(window)
        assert used(got[start : start + 4]) == used(window)
    assert costs(got) != costs(plain)


def test_steps_become_more_even(config):
    """8 ranks of one pack each: the largest over the mean, averaged over the steps."""
    spreads = []
    for window in (1, 8):
        ranks = [costs(take(ordered(config, r, 8, window), 8)) for r in range(8)]
        spreads.append(np.mean([spread(np.array([[c] for c in step])) for step in zip(*ranks, strict=True)]) - 1)
    assert spreads[1] < 0.7 * spreads[0]


@pytest.mark.parametrize("cut", range(1, 10))
def test_resume_is_bit_identical(config, cut):
    whole = take(ordered(config, 1, 2), 15)
    saved = copy([take(ordered(config, r, 2), cut)[-1].state for r in range(2)])
    again = ordered(config, 1, 2)
    again.load_states(saved)
    assert copy(again.state()) == saved[1]  # saved again before the first batch
    for a, b in zip(whole[cut:], take(again, 15 - cut), strict=True):
        same(a, b)


def test_an_iterator_given_up_and_another(config):
    whole, source = take(ordered(config), 11), ordered(config)
    got = take(source, 3) + take(source, 2) + take(source, 6)
    for a, b in zip(whole, got, strict=True):
        same(a, b)


@pytest.mark.parametrize("cuts", [(5, 6), (3, 4), (1, 8)])
@pytest.mark.parametrize("later", [1, 2, 3])
def test_elastic_resume_loses_and_repeats_nothing(config, cuts, later):
    """From two ranks in the middle of a window to any number, with other windows: the epoch is used once."""
    before = [take(ordered(config, r, 2), cut) for r, cut in enumerate(cuts)]
    states = copy([batches[-1].state for batches in before])
    seen = used(itertools.chain(*before))
    ranks = [ordered(config, r, later, window=3) for r in range(later)]
    for rank in ranks:
        rank.load_states(states)
    first = ranks[0].stream
    assert first.counts["examples"] == sum(seen.values())
    for rank in ranks:
        seen += used(take(rank, 5))
    assert max(seen.values()) == 1
    given = {n for rank in ranks for n in used_numbers(rank)}
    left = set().union(*(unread_numbers(rank) for rank in ranks))
    starts = [rank.state()["position"] for rank in ranks]  # of their windows
    end = max([*starts, *given]) + 1
    behind = {n for r, start in zip(ranks, starts, strict=True) for n in range(start, end, later)} - given
    names = {first.reader[n].key for n in range(end) if n not in left | behind}
    assert names == set(seen)


def used_numbers(order):
    """Of the examples given since the start of the window."""
    return set(order.state().get("ahead", {}).get("used", ()))


def unread_numbers(order):
    """In the packer or in the backlog at the start of the window, and not given since."""
    state = order.state()
    return {*state["backlog"], *(n for n, _ in state["packer"]["waiting"])} - used_numbers(order)


def test_only_packs_that_are_used_are_decoded(config):
    """What a window is sorted by is known from the plan, so that it holds no pixels."""
    source = ordered(config, window=8)
    reader, decoded = source.stream.reader, []
    decode = reader.builder.decode
    reader.builder.decode = lambda record, *rest: decoded.append(record.key) or decode(record, *rest)
    given = iter(source)
    batches = [next(given) for _ in range(3)]
    given.close()
    with_crops = {key for key, count in used(batches).items() if count}
    assert decoded and set(decoded) <= with_crops


def test_other_packs_or_windows_go_on_without_loss(config):
    """The same ranks with another sequence length: the window cannot be built again, so what is left is read anew."""
    before = take(ordered(config), 6)
    longer = dataclasses.replace(config, packing=dataclasses.replace(config.packing, sequence_length=160))
    for again in (ordered(longer), ordered(config, window=7), stream(config)):
        again.load_states(copy([before[-1].state]))
        assert max((used(before) + used(take(again, 8))).values()) == 1


def test_windows_end_with_phases(config):
    config.progression = [PhaseConfig(6, 64, 3)]
    batches = take(ordered(config), 12)
    assert [b.input_ids.shape[1] for b in batches] == [64] * 6 + [128] * 6
    for start, stop in ((0, 4), (4, 6), (6, 10)):
        assert costs(batches[start:stop]) == sorted(costs(batches[start:stop]), reverse=True)
    again = ordered(config)
    again.load_states(copy([batches[4].state]))
    for a, b in zip(batches[5:], take(again, 7), strict=True):
        same(a, b)
