"""What is counted of a run's records: per data set and kind, with the first record; on any number of ranks, resumed."""

import copy
import itertools
import json
from collections import Counter

import pytest

from molmo2_nemo.data.config import DataConfig, PackingConfig, PhaseConfig, SourceConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.ordering import CostOrder
from molmo2_nemo.data.reader import Skipped
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.tally import BEFORE, EXAMPLES, KINDS, SKIPPED, UNKNOWN, Tally, counted, words_of

from .test_loader import IM, FakeBuilder, records, same, take
from .test_ordering import COST, unread_numbers

BAD = frozenset(range(3, 400, 17))  # texts of records that cannot be read


class CountingBuilder(FakeBuilder):
    """Examples that have lost something, as much as their text says."""

    def plan(self, record, rng, **options):
        text = record.annotations[0].content.answer.texts[0]
        example = super().plan(record, rng, **options)
        number = int(text) if text.isdigit() else 0
        if text.isdigit() and number in BAD:
            raise KeyError("a fault nobody foresaw")
        example.info = {"ignored": number % 3, "branches_dropped": number % 5 // 4, "tokens_cut": number % 7}
        return example


@pytest.fixture
def config(tmp_path):
    write_shards(tmp_path / "one", records(range(300)), records_per_shard=100)
    write_shards(tmp_path / "two", records(range(300, 390)), records_per_shard=100)
    sources = {name: SourceConfig(str(tmp_path / name), rate) for name, rate in (("one", 0.7), ("two", 0.3))}
    packing = PackingConfig(sequence_length=128, max_crops=6, buffer_size=7)
    return DataConfig(sources=sources, packing=packing, max_bad_share=1.0)


def stream(config, rank=0, size=1, micro=1, damaged=()):
    builder = CountingBuilder(damaged)
    return PackStream(config, micro_batch_size=micro, dp_rank=rank, dp_size=size, builder=builder, im_patch_id=IM)


def saved(states):
    return json.loads(json.dumps(states))


def brute_force(reader, numbers, late=()):
    """The tally of examples by their numbers, one by one; `late`: texts of records with damaged media."""
    found = {}

    def add(source, kind, count, number, key):
        before, first = found.get((source, kind), (0, None))
        here = [] if kind == EXAMPLES else [(number, key)]
        found[source, kind] = before + count, min([*([first] if first else []), *here], default=None)

    for n in sorted(numbers):
        result = reader.plan(n)
        source = reader.mixture.draw(n).source
        if isinstance(result, Skipped):
            add(source, SKIPPED + result.cause, 1, n, result.key)
            continue
        add(source, EXAMPLES, 1, n, result.key)
        for kind, count in result.info.items():
            if count:
                add(source, kind, count, n, result.key)
    return found


def found_in(tally):
    return {key: tuple(count) for key, count in tally.found.items() if count.amount}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_data_set_and_kind_with_the_first_record(config, size):
    merged, numbers = Tally(), set()
    for rank in range(size):
        state = saved(take(stream(config, rank, size), 30)[-1].state)
        merged.update(Tally.of_state(state))
        numbers |= set(range(rank, state["position"], size))
    assert found_in(merged) == brute_force(stream(config).reader, numbers)
    assert {kind for _, kind in merged.found} > {EXAMPLES, SKIPPED + "KeyError", "ignored", "tokens_cut"}
    assert {source for source, _ in merged.found} == {"one", "two"}


@pytest.mark.parametrize("cut", [1, 7])
def test_a_resumed_run_counts_on(config, cut):
    whole = take(stream(config), 20)
    again = stream(config)
    again.load_states(saved([whole[cut - 1].state]))
    assert saved(again.state()) == saved(whole[cut - 1].state)
    for a, b in zip(whole[cut:], take(again, 20 - cut), strict=True):
        same(a, b)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (3, 2)])
def test_another_number_of_ranks_counts_on(config, sizes):
    """Examples that waited for a pack are read again; they are not counted twice."""
    states = None
    for size in sizes:
        streams = [stream(config, rank, size) for rank in range(size)]
        for one in streams:
            if states:
                one.load_states(states)
        states = saved([take(one, 6 + rank)[-1].state for rank, one in enumerate(streams)])
    merged = Tally()
    for state in states:
        merged.update(Tally.of_state(state))
    read = {n for n in range(1000) if n < states[n % sizes[-1]]["position"]} - {n for s in states for n in s["backlog"]}
    assert found_in(merged) == brute_force(stream(config).reader, read)


@pytest.mark.parametrize("cuts, later", [((5, 6), 1), ((3, 4), 2), ((1, 7), 3)])
def test_windows_in_order_of_cost_count_what_they_used(config, cuts, later):
    """A checkpoint in the middle of a window, resumed by other ranks with other windows."""
    orders = [CostOrder(stream(config, rank, 2), 4, COST) for rank in range(2)]
    states = saved([take(order, cut)[-1].state for order, cut in zip(orders, cuts, strict=True)])
    again = [CostOrder(stream(config, rank, later), 3, COST) for rank in range(later)]
    for order in again:
        order.load_states(states)
    merged = Tally()
    for order in again:
        merged.update(order.stream.tally)
    left = set().union(*(unread_numbers(order) for order in again))
    end = max(order.stream.place.position for order in again)
    behind = {n for order in again for n in range(order.stream.place.position, end, later)}
    expected = brute_force(again[0].stream.reader, set(range(end)) - left - behind)
    amounts = {key: count for key, (count, _) in found_in(merged).items() if not key[1].startswith(SKIPPED)}
    assert amounts == {key: count for key, (count, _) in expected.items() if not key[1].startswith(SKIPPED)}
    for a, b in zip(take(again[0], 3), take(again[0], 3), strict=False):
        assert a.state["by_source"] and b.state["by_source"]


def test_a_window_resumed_in_its_middle_counts_on(config):
    whole = take(CostOrder(stream(config), 4, COST), 12)
    for cut in (2, 3, 6):
        again = CostOrder(stream(config), 4, COST)
        again.load_states(saved([whole[cut - 1].state]))
        assert saved(again.state()) == saved(whole[cut - 1].state)
        for a, b in zip(whole[cut:], take(again, 12 - cut), strict=True):
            same(a, b)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_found_late_is_taken_out_again(config, num_workers):
    config.num_workers = num_workers
    damaged = range(5, 400, 6)
    source = stream(config, damaged=damaged)
    state = take(source, 20)[-1].state
    tally, whole = Tally.of_state(saved(state)), take(stream(config), 20)[-1].state
    late = tally.totals()["places_left_empty"]
    assert late and tally.totals()[SKIPPED + "bad media"] == late
    assert state["counts"][EXAMPLES] == whole["counts"][EXAMPLES] - late
    used = {key for pack in source.examples for example in pack for key in [example.key]}
    assert used and all(count.amount > 0 for count in tally.found.values() if not count.first)
    kept = [seen for seen in source.seen if seen.key in used]
    assert all(seen.counts == counted(stream(config).reader.plan(seen.number).info) for seen in kept)


def without_sources(states):
    """The states as they were saved before data sets were counted."""
    old = copy.deepcopy(states)
    for state in old:
        del state["by_source"], state["packer"]["counted"]
        state.get("ahead", {}).pop("counted", None)
    return old


@pytest.mark.parametrize("later", [1, 2])
def test_states_of_before_load(config, later):
    before = [take(stream(config, rank, 2), 5)[-1].state for rank in range(2)]
    streams = [stream(config, rank, later) for rank in range(later)]
    for one in streams:
        one.load_states(saved(without_sources(before)))
    counts, skipped = sum((s.counts for s in streams), Counter()), sum((s.skipped for s in streams), Counter())
    waiting = 0 if later == 2 else sum(len(state["packer"]["waiting"]) for state in before)
    totals = Counter()
    for state in before:
        totals.update(state["counts"])
    assert counts == totals - Counter({EXAMPLES: waiting})
    assert skipped == Counter(before[0]["skipped"]) + Counter(before[1]["skipped"])
    assert {source for source, _ in streams[0].tally.found} == {UNKNOWN}
    batch = take(streams[0], 9)[-1]
    found = Tally.of_state(saved(batch.state))
    assert {source for source, _ in found.found} == {UNKNOWN, "one", "two"}
    assert any(BEFORE in line for line in found.table(config))


def test_an_old_window_loads(config):
    whole = take(CostOrder(stream(config), 4, COST), 12)
    old = saved(without_sources([whole[5].state]))
    again = CostOrder(stream(config), 4, COST)
    again.load_states(old)
    for a, b in zip(whole[6:], take(again, 6), strict=True):
        assert a.keys == b.keys
    fresh = stream(config)
    fresh.load_states(old)
    ahead = old[0]["ahead"]
    assert fresh.counts[EXAMPLES] == old[0]["counts"][EXAMPLES] + len(ahead["used"]) - len(old[0]["packer"]["waiting"])


def test_a_phase_ends_in_between(config):
    config.progression = [PhaseConfig(4, 64, 3)]
    whole = take(stream(config), 10)
    again = stream(config)
    again.load_states(saved([whole[2].state]))
    for a, b in zip(whole[3:], take(again, 7), strict=True):
        same(a, b)
    state = saved(whole[-1].state)
    assert found_in(Tally.of_state(state)) == brute_force(stream(config).reader, range(state["position"]))


def test_the_table_fits_80_columns(config):
    tally = Tally()
    for n, source in enumerate([f"a_data_set_of_a_long_name_{i:02d}" for i in range(14)]):
        for kind in KINDS:
            tally.add(source, kind, 10**6 * (n + 1), (n, f"{source}-000000.tar:{'k' * 80}"))
        tally.add(source, f"{SKIPPED}clip outside the video", 3, (n, f"{source}-000000.tar:7"))
    tally.add(UNKNOWN, "ignored", 5)
    lines = tally.table(config)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for kind in [*KINDS, f"{SKIPPED}clip outside the video"]:
        assert words_of(kind, config) in text
    assert "105,000,005 images after the first 5, left out (data.image.max_images=5)" in text
    assert "14,000,000 a_data_set_of_a_long_name_13, first a_data_set" in text and "and 4 more data sets" in text
    assert Tally.of_json(saved(tally.json())) == tally
    assert tally.summary()["a_data_set_of_a_long_name_00"]["ignored"] == {
        "count": 10**6,
        "first": f"a_data_set_of_a_long_name_00-000000.tar:{'k' * 80}",
    }
    assert Tally().table(config) == []


def test_every_number_of_a_run_is_in_one_data_set(config):
    """The totals of states are the sums over data sets."""
    for batch in itertools.islice(stream(config), 12):
        sums = Counter()
        for kinds in batch.state["by_source"].values():
            sums.update({kind: entry[0] for kind, entry in kinds.items()})
        skipped = {SKIPPED + cause: count for cause, count in batch.state["skipped"].items()}
        assert {k: n for k, n in sums.items() if n} == batch.state["counts"] | skipped
