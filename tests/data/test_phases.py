"""Packs that grow within a stage: sizes by step, exact and elastic resume in every phase, nothing lost between them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from molmo2_nemo.data.config import DataConfig, PackingConfig, PhaseConfig, SourceConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.phases import phase_problems, phases
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.errors import DataError
from tests.data.test_loader import IM, FakeBuilder, records, same, take, used

SIZES = [(64, 3), (64, 3), (96, 6), (128, 6), (128, 6), (128, 6)]  # tokens and crops of a pack at each step


class GrowingBuilder(FakeBuilder):
    """Longer examples where packs are longer, as more frames make them."""

    def plan(self, record, rng, *, weight=None, p_high_res=None, max_tokens=None):
        example = super().plan(record, rng, weight=weight, p_high_res=p_high_res, max_tokens=max_tokens)
        example.input_ids[-1] = max_tokens
        return example


@pytest.fixture
def config(tmp_path):
    write_shards(tmp_path / "one", records(range(50)), records_per_shard=20)
    return DataConfig(
        sources={"one": SourceConfig(str(tmp_path / "one"))},
        packing=PackingConfig(sequence_length=128, max_crops=6, buffer_size=7),
        progression=[PhaseConfig(2, 64, 3), PhaseConfig(3, 96)],
    )


def stream(config, rank=0, size=1, per_step=2):
    return PackStream(
        config,
        micro_batch_size=1,
        dp_rank=rank,
        dp_size=size,
        batches_per_step=per_step,
        builder=GrowingBuilder(),
        im_patch_id=IM,
    )


def test_sizes_follow_the_steps(config):
    batches = take(stream(config), 12)
    assert [b.input_ids.shape[1] for b in batches] == [length for length, _ in SIZES for _ in range(2)]
    assert all(len(b.crops) <= SIZES[i // 2][1] for i, b in enumerate(batches))
    built = [{int(b.input_ids[0][b.example_ids[0] == n][-1]) for n in range(len(b.keys[0]))} for b in batches]
    assert built[0] == {64} and built[-1] == {128}
    assert any(len(sizes) > 1 for sizes in built[4:])  # what waited is used as it was built
    assert max(used(batches).values()) == 1  # nothing twice within the epoch


@pytest.mark.parametrize("cut", range(1, 6))
def test_resume_in_every_phase(config, cut):
    whole = take(stream(config), 16)
    again = stream(config if cut % 2 else replace(config, num_workers=1))
    again.load_states([json.loads(json.dumps(whole[2 * cut - 1].state))])
    for got, expected in zip(take(again, 16 - 2 * cut), whole[2 * cut :], strict=True):
        same(got, expected)


def test_other_number_of_ranks_goes_on_in_the_same_phase(config):
    before = take(stream(config), 4)
    states = [json.loads(json.dumps(before[-1].state))]
    seen = used(before)
    for rank in range(2):
        half = stream(config, rank, 2, per_step=1)
        half.load_states(states)
        after = take(half, 3)
        assert [b.input_ids.shape[1] for b in after] == [96, 128, 128]
        seen += used(after)
    assert max(seen.values()) == 1


def test_phases_change_budgets_and_frames_only(config):
    first, second, last = phases(replace(config, progression=[PhaseConfig(2, 64, 3, 16), PhaseConfig(3, 96)]))
    assert (first.packing.sequence_length, first.packing.max_crops, first.video.max_frames) == (64, 3, 16)
    assert (second.packing.sequence_length, second.packing.max_crops, second.video.max_frames) == (96, 6, 128)
    assert last == replace(config, progression=[])
    assert replace(first, packing=last.packing, video=last.video) == last


@pytest.mark.parametrize(
    ("progression", "message"),
    [
        ([PhaseConfig(0, 64)], r"progression\[0\].until_step=0: must be more than 0"),
        ([PhaseConfig(5, 64), PhaseConfig(5, 96)], r"progression\[1\].until_step=5: must be more than 5"),
        ([PhaseConfig(5, 256)], r"progression\[0\].sequence_length=256: .* at most 128"),
        ([PhaseConfig(5, 64, 9)], r"progression\[0\].max_crops=9"),
    ],
)
def test_bad_progression(config, progression, message):
    bad = replace(config, progression=progression)
    assert len(list(phase_problems(bad))) == 1
    with pytest.raises(DataError, match=message):
        stream(bad)
