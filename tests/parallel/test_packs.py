"""One reader per model-parallel group: same packs everywhere, one reading, same training, errors that end everybody."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tests.support.packs import demo_data, tiny_run
from tests.support.thorough import mostly

LAYOUTS = {"tp2": {"tensor": 2}, "cp2": {"context": 2}, "pp2": {"pipeline": 2}, "dp2": {"data": 2}}


def digest(batch):
    """A batch as something that can be compared: content, types and shapes of every array."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    return (
        {n: (a.dtype.str, a.shape, hashlib.sha256(a.tobytes()).hexdigest()) for n, a in arrays.items()},
        (batch.keys, batch.sources),
        batch.state,
    )


def counted_reads():
    """Counts the records this process reads from now on."""
    from molmo2_nemo.data.shards import ShardDataset

    reads = []
    original = ShardDataset.read

    def read(self, index):
        reads.append(index)
        return original(self, index)

    ShardDataset.read = read
    return reads, lambda: setattr(ShardDataset, "read", original)


def shared_packs(folder: Path, dp_size: int, slots: int, steps: int, workers: int, balance: bool, restored=None):
    """Run `SharedPacks` in groups of ranks [0, 1], [2, 3], ...: digests, reads, and the last state."""
    import torch.distributed as dist

    from molmo2_nemo.data.loader import PackStream
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.parallel.packs import SharedPacks, pack_groups
    from molmo2_nemo.training.data import cost_model

    dp_rank = dist.get_rank() * dp_size // dist.get_world_size()
    config = demo_data(folder)
    config.num_workers = workers
    reads, undo = counted_reads()

    def open_stream():
        stream = PackStream(config, micro_batch_size=1, dp_rank=dp_rank, dp_size=dp_size)
        if restored:
            stream.load_states(restored)
        return stream

    try:
        groups = pack_groups(dp_rank, dp_size)
        cost = cost_model(preset("tiny")) if balance else None
        got = list(SharedPacks(open_stream, groups, micro_batches=slots, steps=steps, cost=cost))
    finally:
        undo()
    costs = [cost_model(preset("tiny")).of(batch) for batch in got]
    return [digest(batch) for batch in got], len(reads), got[-1].state, costs


def plain(folder: Path, dp_rank: int, dp_size: int, count: int):
    import itertools

    from molmo2_nemo.data.loader import PackStream

    stream = PackStream(demo_data(folder), micro_batch_size=1, dp_rank=dp_rank, dp_size=dp_size)
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("workers_per_rank", [0, 1])
def test_a_group_gets_one_readers_packs(workers, shards, workers_per_rank):
    got = workers.run(shared_packs, shards, 1, 2, 3, workers_per_rank, True, ranks=2)
    assert got[0][0] == got[1][0]
    own = [digest(batch) for batch in plain(shards, 0, 1, 6)]
    assert [d[:2] for d in got[0][0]] == [d[:2] for d in own]
    assert [d[2] for d in got[0][0]][1::2] == [d[2] for d in own][1::2]  # the state at the end of each step
    assert got[1][1] == 0 and (got[0][1] > 0 or workers_per_rank)  # workers read in processes of their own


def test_packs_are_dealt_and_resume_exactly(workers, shards):
    """Four ranks, two readers: a step holds both readers' packs, spread evenly; a resumed run goes on alike."""
    whole = workers.run(shared_packs, shards, 2, 4, 3, 0, True, ranks=4)
    kept = workers.run(shared_packs, shards, 2, 4, 3, 0, False, ranks=4)
    assert whole[0][0] == whole[1][0] and whole[2][0] == whole[3][0]
    for rank in (0, 2):
        own = [digest(b)[:2] for b in plain(shards, rank // 2, 2, 12)]
        assert [d[:2] for d in kept[rank][0]] == own
    moved = 0
    for step in range(3):
        at = slice(4 * step, 4 * step + 4)
        keys = [sorted(str(d[1]) for rank in (0, 2) for d in run[rank][0][at]) for run in (whole, kept)]
        assert keys[0] == keys[1]
        heaviest = [max(sum(run[rank][3][at]) for rank in (0, 2)) for run in (whole, kept)]
        assert heaviest[0] <= heaviest[1]
        moved += heaviest[0] < heaviest[1]
    assert moved
    first = workers.run(shared_packs, shards, 2, 4, 1, 0, True, ranks=4)
    states = json.loads(json.dumps([run[2] for run in first]))
    rest = workers.run(shared_packs, shards, 2, 4, 2, 0, True, states, ranks=4)
    for rank in range(4):
        assert first[rank][0] + rest[rank][0] == whole[rank][0]


def collecting(folder: Path):
    """Packs read by a worker that collects garbage, forked off a process where a group's threads have lost their owner:
    their number, and that of the collections."""
    import gc
    import itertools
    import multiprocessing

    import torch.distributed as dist

    from molmo2_nemo.data.loader import PackStream
    from molmo2_nemo.data.reader import default_builder

    class Ring:
        """Garbage, once nobody else has it."""

        def __init__(self):
            self.ring, self.group = self, dist.new_group([0], backend="gloo")

    config = demo_data(folder)
    config.num_workers = 1
    builder, im_patch = default_builder(config)
    collections = multiprocessing.Value("i", 0)

    class Collecting:
        def plan(self, *args, **kwargs):
            gc.collect()
            collections.value += 1
            return builder.plan(*args, **kwargs)

        def decode(self, *args, **kwargs):
            gc.collect()
            return builder.decode(*args, **kwargs)

    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    gc.disable()  # until the worker has been forked off
    try:
        Ring()
        dist.destroy_process_group()
        stream = PackStream(
            config, micro_batch_size=1, dp_rank=0, dp_size=1, builder=Collecting(), im_patch_id=im_patch
        )
        return len(list(itertools.islice(iter(stream), 2))), collections.value
    finally:
        gc.enable()
        multiprocessing.set_start_method(method, force=True)


def test_a_worker_does_not_collect_what_it_inherits(workers, shards):
    [(packs, collections)] = workers.run(collecting, shards)
    assert packs == 2 and collections > 0


def failing(folder: Path, when: str):
    """The message every rank ends with when rank 0's reader fails."""
    import torch.distributed as dist

    from molmo2_nemo.data.loader import PackStream
    from molmo2_nemo.data.manifest import ShardError
    from molmo2_nemo.parallel.packs import SharedPacks, pack_groups

    rank = dist.get_rank()

    def open_stream():
        if when == "at once" and rank == 0:
            raise ShardError("no shards there")
        stream = PackStream(demo_data(folder), micro_batch_size=1, dp_rank=rank // 2, dp_size=2)
        if rank == 0:
            original, calls = stream.reader.__class__.pieces, []

            class Breaking(stream.reader.__class__):
                def pieces(self, n):
                    calls.append(n)
                    if len(calls) > 30:
                        raise ShardError("the disk is gone") if when == "later" else MemoryError("none left")
                    return original(self, n)

            stream.reader.__class__ = Breaking
        return stream

    used = 0
    try:
        for _ in SharedPacks(open_stream, pack_groups(rank // 2, 2), micro_batches=2, steps=200):
            used += 1
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", used
    return "no error", used


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("at once", "DataError: no shards there"),
        ("later", "DataError: the disk is gone"),
        ("unforeseen", "RuntimeError: the data loader of rank 0 failed: MemoryError: none left"),
    ],
)
def test_a_failing_reader_ends_every_rank(workers, shards, when, message):
    got = workers.run(failing, shards, when, ranks=4)
    assert {text for text, _ in got} == {message}
    assert len({used for _, used in got}) == 1 and (got[0][1] > 0) == (when != "at once")


def trained(folder: Path, out: Path, share: bool, parallel: dict[str, int]):
    """Metrics of a real run on the demo's shards, and the records this rank read."""
    from molmo2_nemo.data.config import DataConfig
    from molmo2_nemo.nemo.train import train
    from molmo2_nemo.rundir.lines import read_metrics
    from molmo2_nemo.rundir.paths import stage_dir

    cfg = tiny_run(out, 3, **parallel)
    data: DataConfig = demo_data(folder, length=512)
    data.share_packs = share
    cfg.data = data
    reads, undo = counted_reads()
    try:
        summary = train(cfg)
    finally:
        undo()
    assert summary["counts"]["examples"] > 0 and summary["skipped"] == {}
    return read_metrics(stage_dir(cfg)), len(reads)


@pytest.mark.parametrize("layout", mostly(LAYOUTS, "dp2", "cp2"))
def test_training_is_the_same(workers, shards, tmp_path, layout):
    with_sharing = workers.run(trained, shards, tmp_path / "a", True, LAYOUTS[layout], ranks=2, fit=True)
    without = workers.run(trained, shards, tmp_path / "b", False, LAYOUTS[layout], ranks=2, fit=True)
    for name in ("loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm", "tokens", "skipped"):
        a, b = ([m[name] for m in run[0][0]] for run in (with_sharing, without))
        if layout == "dp2":  # the step's packs may have changed places, and with them the order of sums
            np.testing.assert_allclose(a, b, rtol=1e-5)
        else:
            assert a == b, name
    assert without[1][1] > 0
    assert (with_sharing[1][1] == 0) == (layout != "dp2")
