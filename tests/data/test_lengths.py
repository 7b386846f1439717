"""Several lengths in one run: what each step has, where examples and documents go, and resume, all counted by hand."""

import json
from collections import Counter, defaultdict

import pytest

from molmo2_nemo.data.config import DataConfig, LengthConfig, PackingConfig, PhaseConfig, SourceConfig
from molmo2_nemo.data.length_stream import LengthStream
from molmo2_nemo.data.lengths import length_at, length_problems
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.errors import DataError

from .test_loader import same, take
from .test_raw_text import TOKENIZER, asked, record, words

LENGTHS = [32, 64, 256]
SHARES = [2.0, 1.0, 1.0]
TEXTS = [words(n, seed) for seed, n in enumerate([5, 20, 31, 32, 40, 63, 64, 100, 255, 256, 300, 700])]


@pytest.fixture
def config(tmp_path):
    write_shards(tmp_path / "books", ((f"{i:04d}", record(text)) for i, text in enumerate(TEXTS)), records_per_shard=5)
    write_shards(tmp_path / "chat", ((f"c{i}", asked("x" * i)) for i in range(60)))
    return DataConfig(
        sources={name: SourceConfig(str(tmp_path / name)) for name in ("books", "chat")},
        packing=PackingConfig(sequence_length=256, buffer_size=4),
        lengths=[LengthConfig(*pair) for pair in zip(LENGTHS, SHARES, strict=True)],
    )


def stream(config, rank=0, size=1, per_step=2):
    return LengthStream(config, micro_batch_size=1, dp_rank=rank, dp_size=size, batches_per_step=per_step)


def brute_force(text):
    """(length, inputs) of each piece of a document: the greatest lengths first, the rest in the shortest packs."""
    inputs = [TOKENIZER.document_id, *TOKENIZER.encode(text)]
    found = []
    for length in reversed(LENGTHS):
        while len(inputs) >= length or (length == LENGTHS[0] and inputs):
            found.append((length, tuple(inputs[:length])))
            inputs = inputs[length:]
    return found


def examples(batch):
    ids = batch.example_ids[0]
    return [(batch.keys[0][n], tuple(batch.input_ids[0][ids == n].tolist())) for n in range(ids.max() + 1)]


def test_steps_have_one_length_and_the_same_tokens(config):
    source = iter(stream(config))
    seen = Counter()
    for step in range(40):
        batch = next(source)
        length = batch.input_ids.shape[1]
        assert length == LENGTHS[length_at(config, step)]
        rest = [next(source) for _ in range(2 * 256 // length - 1)]
        assert {b.input_ids.shape[1] for b in rest} <= {length}
        seen[length] += 1
        assert (batch if not rest else rest[-1]).state["steps"] == step + 1
    assert set(seen) == set(LENGTHS)
    drawn = Counter(length_at(config, step) for step in range(20_000))
    assert [drawn[i] / 20_000 for i in range(3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.015)


def test_every_example_and_every_token_of_a_document_is_in_packs_of_its_length(config):
    expected = [piece for text in TEXTS for piece in brute_force(text)]
    found, chats = defaultdict(Counter), defaultdict(set)
    for batch in take(stream(config), 900):
        for key, inputs in examples(batch):
            size = batch.input_ids.shape[1]
            if key.startswith("books"):
                found[size][inputs] += 1
            else:
                assert len(inputs) <= size and all(len(inputs) > smaller for smaller in LENGTHS if smaller < size)
                chats[size].add(key)
    for length in LENGTHS:
        once = Counter(inputs for size, inputs in expected if size == length)
        assert set(found[length]) == set(once)
        epochs = [found[length][inputs] / count for inputs, count in once.items()]
        assert max(epochs) - min(epochs) <= 2  # they are whole but for the last
    assert len(set.union(*chats.values())) == 60 == sum(map(len, chats.values()))


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_resume_is_bit_identical(config, cut):
    whole, ends = [], []
    for batch in take(stream(config), 120):
        whole.append(batch)
        if len(ends) < batch.state["steps"]:
            ends.append(len(whole))
    again = stream(config)
    again.load_states([json.loads(json.dumps(whole[ends[cut - 1] - 1].state))])
    for a, b in zip(whole[ends[cut - 1] :], take(again, 120 - ends[cut - 1]), strict=True):
        same(a, b)
        assert a.state == b.state


def test_ranks_share_each_length_and_their_number_may_change(config):
    """Two ranks have the same length in each step, and other examples; one rank goes on with the step after."""
    two = [stream(config, rank, 2, per_step=1) for rank in range(2)]
    first = [take(each, 24) for each in two]
    assert [b.input_ids.shape for b in first[0]] == [b.input_ids.shape for b in first[1]]
    chats = [{key for batch in batches[:8] for key in batch.keys[0] if key.startswith("chat")} for batches in first]
    assert not chats[0] & chats[1]
    ends = [batch.state["steps"] for batch in first[0]]
    done = ends.index(ends[-1])  # the batch that ended the last whole step
    states = [json.loads(json.dumps(batches[done].state)) for batches in first]
    one = stream(config, per_step=2)
    one.load_states(states)
    assert one.steps == states[0]["steps"]
    assert next(iter(one)).input_ids.shape[1] == LENGTHS[length_at(config, one.steps)]


def test_a_length_that_nothing_has_ends_the_run(config, monkeypatch):
    monkeypatch.setattr("molmo2_nemo.data.planner.PASSED_AT_LEAST", 100)
    config.sources = {"chat": config.sources["chat"]}
    config.packing.sequence_length = 4096
    config.lengths = [LengthConfig(2048, 0.0), LengthConfig(4096, 1.0)]
    with pytest.raises(DataError, match="in a row can be used in packs of 4096 tokens: leave that length out"):
        next(iter(stream(config)))


def test_lengths_that_make_no_sense(config):
    def problems(*pairs, longest=2, **more):
        config.lengths = [LengthConfig(*pair) for pair in pairs]
        return " | ".join(length_problems(config, longest))

    assert not problems((32,), (64,), (256,)) and not problems()
    assert "data.lengths[1].sequence_length=32: must be more than 64" in problems((64,), (32,), (256,))
    assert "take a divisor of 512, or a multiple of 3 micro-batches" in problems((96,), (256,))
    assert "data.lengths ends at 128 tokens, but data.packing.sequence_length=256" in problems((64,), (128,))
    assert "every share is 0" in problems((64, 0.0), (256, 0.0))
    assert "data.lengths[0].max_crops=500: must be from 1 to" in problems((64, 1.0, 500), (256,))
    config.progression = [PhaseConfig(3, 64)]
    assert "data.lengths with data.progression" in problems((64,), (256,))
