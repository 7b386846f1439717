"""The stream of batches: exact and elastic resume, workers that change nothing, bad records, early errors."""

import itertools
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch

from molmo2_nemo.data import loader
from molmo2_nemo.data.collate import collate
from molmo2_nemo.data.config import DataConfig, PackingConfig, SourceConfig
from molmo2_nemo.data.example import Example
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.manifest import ShardError
from molmo2_nemo.data.packing import Item, Packer
from molmo2_nemo.data.planner import TooManyBadRecords
from molmo2_nemo.data.reader import ExampleReader
from molmo2_nemo.data.record import BadRecord
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.workers import PackPixels, PackTask, Room, in_order
from molmo2_nemo.errors import DataError

torch.set_num_threads(1)
IM = 500


class FakeBuilder:
    """Examples whose sizes and values depend on the record, the options and the rng, as the real builder's do."""

    def __init__(self, damaged=()):
        self.damaged = set(map(str, damaged))  # texts of records whose media turn out to be damaged late

    def plan(self, record, rng, *, weight=None, p_high_res=None, max_tokens=None):
        crops = int(rng.integers(0, 4))
        tokens = int(rng.integers(crops + 3, 60))
        ids = rng.integers(0, 400, tokens)
        ids[:crops] = IM
        text = record.annotations[0].content.answer.texts[0]
        if text == "too long":
            crops, ids = 0, np.zeros(999, np.int64)
        if text == "crash":
            raise KeyError("a fault nobody foresaw")
        ids[-1] = 400 + int(text) if text.isdigit() else 0
        return Example(
            input_ids=ids,
            labels=ids + 1,
            loss_weights=np.full(len(ids), weight or 1.0, np.float32),
            position_ids=np.arange(len(ids)),
            branch_ids=np.zeros(len(ids), np.int64),
            visual=ids == IM,
            crops=np.zeros((0, 4, 3), np.uint8),
            pooling=np.arange(crops * 4).reshape(crops, 4),
            unit_crops=np.ones(crops, np.int64),
            unit_pooled_tokens=np.ones(crops, np.int64),
        )

    def decode(self, record, images, out):
        text = record.annotations[0].content.answer.texts[0]
        if text in self.damaged:
            raise BadRecord(record.key, "bad media", "cut off in its middle")
        out[...] = np.random.default_rng(int(text)).integers(0, 255, out.shape)
        return {}


def records(texts):
    for i, text in enumerate(texts):
        data = {"annotations": [{"style": "long_caption", "text": str(text)}]}
        yield f"{i:04d}", {"json": json.dumps(data).encode()}


@pytest.fixture
def config(tmp_path):
    write_shards(tmp_path / "one", records(range(50)), records_per_shard=20)
    write_shards(tmp_path / "two", records(range(50, 63)), records_per_shard=20)
    return DataConfig(
        sources={
            "one": SourceConfig(str(tmp_path / "one"), 0.7),
            "two": SourceConfig(str(tmp_path / "two"), 0.3, weight=0.2),
        },
        packing=PackingConfig(sequence_length=128, max_crops=6, buffer_size=7),
        max_bad_in_a_row=5,
    )


def stream(config, rank=0, size=1, micro=2, damaged=()):
    builder = FakeBuilder(damaged)
    return PackStream(config, micro_batch_size=micro, dp_rank=rank, dp_size=size, builder=builder, im_patch_id=IM)


def take(source, count):
    return list(itertools.islice(source, count))


def same(a, b):
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=f.name)
        else:
            assert x == y, f.name


def used(batches):
    return Counter(key for b in batches for pack in b.keys for key in pack)


def test_batches(config):
    batch = take(stream(config), 1)[0]
    assert batch.input_ids.shape == (2, 128) and len(batch.keys) == 2
    assert (batch.input_ids >= 0).mean() > 0.7
    for b, keys in enumerate(batch.keys):
        ids = batch.example_ids[b]
        assert ids.max() == len(keys) - 1
        for number, key in enumerate(keys):  # the value the record put there, and the weight of its source
            last = np.flatnonzero(ids == number)[-1]
            base, weight = (50, 0.2) if key.startswith("two") else (0, 1.0)
            assert batch.input_ids[b, last] == 400 + base + int(key.split(":")[1])
            assert batch.loss_weights[b, last] == np.float32(weight)


@pytest.mark.parametrize("cut", [1, 4, 9])
@pytest.mark.parametrize("rank, size", [(0, 1), (1, 2)])
def test_resume_is_bit_identical(config, cut, rank, size):
    others = [b.state for b in [take(stream(config, r, size), cut)[-1] for r in range(size)]]
    whole = take(stream(config, rank, size), cut + 12)
    states = json.loads(json.dumps(others))
    resumed = stream(config, rank, size)
    resumed.load_states(states[::-1] + states)  # any order, repeated by the ranks of a context-parallel group
    for a, b in zip(whole[cut:], take(resumed, 12), strict=True):
        same(a, b)


def test_resume_twice_and_in_the_same_object(config):
    whole = take(stream(config), 12)
    again = stream(config)
    got = take(again, 3)  # an iterator that was given up, then another one
    got += take(again, 2)
    third = stream(config)
    third.load_states([json.loads(json.dumps(again.state()))])
    got += take(third, 7)
    for a, b in zip(whole, got, strict=True):
        same(a, b)


def test_state_of_a_stream_not_yet_begun(config):
    """Saved again right after loading, before the waiting examples are built: nothing is lost."""
    states = json.loads(json.dumps([take(stream(config), 3)[-1].state]))
    again = stream(config)
    again.load_states(states)
    assert [again.state()] == states


def test_too_large_a_share_of_bad_records(config, tmp_path, monkeypatch):
    """One in four is bad, never many in a row."""
    monkeypatch.setattr("molmo2_nemo.data.planner.SHARE_AFTER", 40)
    write_shards(tmp_path / "bad", records(["crash" if i % 4 == 1 else i for i in range(40)]))
    config.sources = {"bad": SourceConfig(str(tmp_path / "bad"))}
    config.max_bad_in_a_row = 30
    config.max_bad_share = 0.3
    source = stream(config)
    take(source, 30)
    assert 0.2 < source.skipped["KeyError"] / (source.skipped["KeyError"] + source.counts["examples"]) < 0.3
    config.max_bad_share = 0.2
    with pytest.raises(TooManyBadRecords, match=r"of \d+ records \(2\d%\) could not be used.*data.max_bad_share"):
        take(stream(config), 30)


def test_workers_change_nothing(config):
    whole = take(stream(config), 8)
    config.num_workers = 2
    source = stream(config)
    got = take(source, 4)
    for a, b in zip(whole, got, strict=False):
        same(a, b)
    resumed = stream(config)
    resumed.load_states([json.loads(json.dumps(got[-1].state))])
    for a, b in zip(whole[4:], take(resumed, 4), strict=True):
        same(a, b)


def numbers_of(state):
    return state["backlog"] + [n for n, _ in state["packer"]["waiting"]]


@pytest.mark.parametrize("sizes", [(2, 3, 1), (4, 1, 2), (1, 5, 3)])
def test_elastic_resume_loses_and_repeats_nothing(config, sizes):
    """Runs of different widths in a row: used and waiting examples together are exactly a prefix of the stream."""
    states, seen = None, Counter()
    for step, size in enumerate(sizes):
        streams = [stream(config, r, size) for r in range(size)]
        for s in streams:
            if states:
                s.load_states(json.loads(json.dumps(states)))
        mixture = streams[0].reader
        batches = [take(s, 3 + step + r % 2) for r, s in enumerate(streams)]  # ranks need not be in step
        seen.update(used(itertools.chain(*batches)))
        states = [b[-1].state for b in batches]
        waiting = Counter(mixture[n].key for state in states for n in numbers_of(state))
        end = max(state["position"] for state in states)
        unread = Counter(mixture[n].key for state in states for n in range(state["position"], end, size))
        assert seen + waiting + unread == Counter(mixture[n].key for n in range(end))


def test_ranks_share_the_stream(config):
    keys = [used(take(stream(config, r, 3), 4)) for r in range(3)]
    reader = stream(config).reader
    for rank in range(3):
        mine = Counter(reader[n].key for n in range(rank, 3000, 3))
        assert not keys[rank] - mine


def test_states_must_fit(config, tmp_path):
    states = [take(stream(config, r, 2), 1)[-1].state for r in range(2)]
    fresh = stream(config)
    with pytest.raises(DataError, match="lacks the data state of data-parallel rank 1"):
        fresh.load_states(states[:1])
    with pytest.raises(DataError, match="no state"):
        fresh.load_states([])
    with pytest.raises(DataError, match="two different data states"):
        fresh.load_states([*states, {**states[0], "position": 98}])
    config.seed += 1
    with pytest.raises(DataError, match="seed"):
        stream(config).load_states(states)
    config.seed -= 1
    config.sources["two"].rate = 0.9
    with pytest.raises(DataError, match="data set 'one' is not the one of the saved run"):
        stream(config).load_states(states)
    config.sources["two"].rate = 0.3
    write_shards(tmp_path / "two", records(range(1, 14)), overwrite=True)
    with pytest.raises(DataError, match="data set 'two' is not the one.*molmo2 prepare was called again.*new run"):
        stream(config).load_states(states)


def test_bad_records_are_skipped_and_listed(config, tmp_path):
    texts = ["crash" if i % 4 == 1 else "too long" if i % 4 == 2 else i for i in range(40)]
    data = list(records(texts))
    data[0][1]["evil.pkl"] = b"cos\nsystem\n(S'false'\ntR."
    write_shards(tmp_path / "bad", data)
    config.sources = {"bad": SourceConfig(str(tmp_path / "bad"))}
    config.quarantine = str(tmp_path / "run" / "quarantine.jsonl")
    config.max_bad_in_a_row = 30
    source = stream(config)
    batches = take(source, 6)
    good = {f"bad-000000.tar:{i:04d}" for i in range(3, 40) if i % 4 in (0, 3)}
    assert set(used(batches)) <= good
    assert set(source.skipped) == {"KeyError", "too long", "unsafe member"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert len(lines) == sum(source.skipped.values()) == len(source.quarantined)
    assert {"record", "cause", "detail"} == set(lines[0])
    assert any("bad-000000.tar:" in line["record"] and "999 tokens" in line["detail"] for line in lines)
    resumed = stream(config)
    resumed.load_states([batches[2].state])
    for a, b in zip(batches[3:], take(resumed, 3), strict=True):
        same(a, b)


class LargePacks:
    """100 MB of crops each, made in no time: sending them is what takes time."""

    def __getitem__(self, n: int) -> PackPixels:
        return PackPixels(torch.zeros((100, 1000, 1000), dtype=torch.uint8), [n])


def test_workers_that_are_ended_while_they_send_end_well(monkeypatch):
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    multiprocessing.set_start_method("spawn")
    packs = in_order(LargePacks(), iter(range(100)), num_workers=2, prefetch=4)
    before = set(multiprocessing.active_children())
    assert next(packs).said == [0]
    processes = set(multiprocessing.active_children()) - before
    packs.close()
    assert len(processes) == 2 and [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("limit", [1, 150])
def test_little_room_for_packs_ahead_of_their_turn(config, monkeypatch, limit):
    """The same batches; and workers that wait for room end when the reader is given up."""
    alone = take(stream(config), 6)
    config.num_workers, config.prefetch = 4, 3
    monkeypatch.setattr(loader, "MIB", limit)
    config.ahead_mib = 1
    before = set(multiprocessing.active_children())
    batches = iter(stream(config))
    for batch in alone:
        same(batch, next(batches))
    processes = set(multiprocessing.active_children()) - before
    batches.close()
    assert len(processes) == 5 and all(process.exitcode == 0 for process in processes)


def test_packs_wait_until_there_is_room():
    """Packs of 60 bytes where 150 fit: two may be decoded, the third when the first is taken, the next always."""
    tasks = [PackTask(((n, 0, None, 5),), (4, 3), n * 60) for n in range(4)]
    room, large = Room(150), Room(1)
    room.wait(tasks[0]), room.wait(tasks[1]), large.wait(tasks[0])
    done = []
    waiting = [threading.Thread(target=lambda task=task: done.append((room.wait(task), task))) for task in tasks[2:]]
    for thread in waiting:
        thread.start()
    time.sleep(0.2)
    assert not done
    room.take(tasks[0])
    waiting[0].join(10)
    assert done == [(True, tasks[2])]
    room.close()
    waiting[1].join(10)
    assert done == [(True, tasks[2]), (False, tasks[3])]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_run_stops_when_nothing_is_good(config, tmp_path, num_workers):
    write_shards(tmp_path / "bad", records(["crash"] * 9))
    config.sources = {"bad": SourceConfig(str(tmp_path / "bad"))}
    config.num_workers = num_workers
    with pytest.raises(TooManyBadRecords, match="5 records in a row.*a fault nobody foresaw.*KeyError: 5"):
        take(stream(config), 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_breaks_stops_the_run(config, num_workers):
    config.num_workers = num_workers
    source = stream(config)
    for dataset in source.reader.datasets.values():
        for shard in dataset.path.glob("*.tar"):
            shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ShardError, match="cut off"):
        take(source, 1)


def test_errors_before_the_first_batch(config, tmp_path):
    config.sources["three"] = SourceConfig(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="'three': no folder at"):
        stream(config)
    config.sources["three"].rate = 0.0  # switched off: not even opened
    stream(config)
    config.sources = {}
    with pytest.raises(DataError, match="data.sources is empty"):
        stream(config)
    with pytest.raises(DataError, match="rank 2 of 2"):
        stream(config, 2, 2)


def test_state_is_small_and_json(config):
    batch = take(stream(config), 5)[-1]
    text = json.dumps(batch.state, allow_nan=False)
    assert json.loads(text) == batch.state and len(text) < 2000


def test_a_worker_leaves_its_parents_groups_alone(tmp_path):
    """Collecting one as garbage would end it, or hang: the group's threads are not in the worker."""
    script = tmp_path / "fork.py"
    script.write_text(
        "import gc, os, torch.distributed as dist\n"
        "from molmo2_nemo.data import workers\n"
        "gc.disable()\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "class Cycle: pass\n"
        "cycle = Cycle(); cycle.itself, cycle.group = cycle, dist.new_group([0])\n"
        "dist.destroy_process_group(); del cycle\n"
        "if (pid := os.fork()) == 0:\n"
        "    workers.start_worker(0); gc.enable(); gc.collect(); os._exit(0)\n"
        "os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) and 1)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-1000:]


DAMAGED = range(3, 50, 9)  # texts of records of the set "one"


def keys_of(texts):
    return {f"one-{i // 20:06d}.tar:{i:04d}" for i in texts}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_found_late_leaves_a_place_empty(config, tmp_path, num_workers):
    """The packs are those of whole data without the damaged examples; each is named, and counted when it is met."""
    config.num_workers, config.max_bad_share = num_workers, 1.0
    config.quarantine = str(tmp_path / "quarantine.jsonl")
    source, bad = stream(config, damaged=DAMAGED), keys_of(DAMAGED)
    met = Counter()
    for number, (batch, whole) in enumerate(zip(take(source, 12), take(stream(config), 12), strict=True)):
        for b, pack in enumerate(whole.keys):
            lost = [i for i, key in enumerate(pack) if key in bad and whole.visual[b][whole.example_ids[b] == i].any()]
            kept = [i for i in range(len(pack)) if i not in lost]
            met.update(pack[i] for i in lost)
            assert batch.keys[b] == [pack[i] for i in kept], number
            for name in ("input_ids", "labels", "loss_weights", "position_ids", "visual"):
                parts = [getattr(whole, name)[b][whole.example_ids[b] == i] for i in kept]
                ours = getattr(batch, name)[b][batch.example_ids[b] >= 0]
                np.testing.assert_array_equal(ours, np.concatenate([ours[:0], *parts]))
        assert batch.crops.shape[1:] == (4, 3) and len(batch.crops) == int(batch.unit_crops.sum())
        late = sum(met.values())
        assert batch.state["counts"]["places_left_empty"] == late if late else "skipped" not in batch.state["counts"]
        assert batch.state["skipped"].get("bad media", 0) == late
        assert batch.state["counts"]["examples"] == whole.state["counts"]["examples"] - late
    assert met
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert Counter(line["record"] for line in lines) == met
    assert all("cut off in its middle" in line["detail"] and "left empty" in line["detail"] for line in lines)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_with_late_damage_resumes_alike(config, num_workers):
    config.max_bad_share = 1.0
    whole = take(stream(config, damaged=DAMAGED), 12)
    config.num_workers = num_workers
    for cut in (1, 5, 8):
        again = stream(config, damaged=DAMAGED)
        again.load_states([json.loads(json.dumps(whole[cut - 1].state))])
        for a, b in zip(whole[cut:], take(again, 12 - cut), strict=True):
            same(a, b)


def test_a_pack_of_which_nothing_is_left_is_padding(config):
    config.max_bad_in_a_row, config.max_bad_share = 1000, 1.0
    config.packing = PackingConfig(sequence_length=60, max_crops=3, buffer_size=1)
    batch = next(b for b in stream(config, micro=1, damaged=range(63)) if b.keys == [[]])
    assert (batch.input_ids == -1).all() and (batch.loss_weights == 0).all() and batch.crops.shape == (0, 4, 3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_run_stops_when_nothing_can_be_decoded(config, num_workers):
    config.num_workers = num_workers
    with pytest.raises(TooManyBadRecords, match="5 records in a row could not be used.*cut off in its middle"):
        take(stream(config, damaged=range(63)), 20)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_planning_ahead_ends_no_sooner_than_the_batches(config, tmp_path, num_workers):
    """An error that planning meets far ahead comes after all batches before it, and then at once."""
    texts = [*range(30), *["crash"] * 20]
    write_shards(tmp_path / "ends", records(texts))
    config.sources = {"ends": SourceConfig(str(tmp_path / "ends"))}
    config.seed = 3
    found = []
    for workers in (0, num_workers):
        config.num_workers = workers
        source, batches = stream(config), []
        with pytest.raises(TooManyBadRecords, match="records in a row") as caught:
            for batch in source:
                batches.append(batch)
        found.append((batches, str(caught.value), source.skipped, len(source.quarantined)))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        same(a, b)
    assert found[0][1:] == found[1][1:]


def plain_batches(config, count):
    """One process, no looking ahead: read, build, pack, collate."""
    reader = ExampleReader(config, FakeBuilder(), IM)
    packing = config.packing
    packer = Packer(packing.sequence_length, packing.max_crops, buffer_size=packing.buffer_size)
    packs, n = [], 0
    while len(packs) < 2 * count:
        example = reader[n]
        pack = packer.add(Item(n, example.num_tokens, len(example.crops), example))
        packs += [[item.payload for item in pack]] if pack else []
        n += 1
    return [
        collate(packs[i : i + 2], sequence_length=packing.sequence_length, im_patch_id=IM)
        for i in range(0, 2 * count, 2)
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_decoding_late_changes_nothing(config, num_workers):
    config.num_workers = num_workers
    for late, plain in zip(take(stream(config), 9), plain_batches(config, 9), strict=True):
        plain.state = late.state
        same(late, plain)


def test_what_waits_holds_no_pixels_and_each_is_decoded_once(config, monkeypatch):
    decoded = Counter()
    original = FakeBuilder.decode
    monkeypatch.setattr(FakeBuilder, "decode", lambda self, *a: decoded.update([a[0].key]) or original(self, *a))
    source = stream(config)
    batches = take(source, 3)
    assert len(source.place.waiting) > 3 and not any(len(item.payload.crops) for item in source.place.waiting)
    with_crops = [n.key for pack in source.examples for n in pack if n.num_crops]
    assert set(decoded.values()) == {1} and set(with_crops) <= set(decoded) <= set(used(batches))
