"""The order of examples: pure, complete within every epoch, and drawn at the rates."""

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.data.config import SourceConfig
from molmo2_nemo.data.mixture import CHUNK, Draw, Mixture, example_rng, normalised_rates, permute
from molmo2_nemo.errors import DataError

LENGTHS = {"a": 7, "b": 1, "c": 130}
RATES = {"a": 0.5, "b": 0.1, "c": 0.4}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**128 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_spreads():
    size = 8
    firsts = Counter(permute(0, size, random.Random(i).getrandbits(128)) for i in range(4000))
    assert max(firsts.values()) < 1.3 * 500 and min(firsts.values()) > 0.7 * 500


def test_every_epoch_holds_every_record_once():
    mixture = Mixture(1, RATES, LENGTHS)
    seen = defaultdict(list)
    for n in range(2000):
        draw = mixture.draw(n)
        seen[draw.source, draw.epoch].append(draw.index)
    for (source, epoch), indices in seen.items():
        assert len(set(indices)) == len(indices)
        if (source, epoch + 1) in seen:
            assert sorted(indices) == list(range(LENGTHS[source]))
    assert seen["a", 0] != seen["a", 1]


def test_random_access_equals_sequential_across_chunks():
    sequential = Mixture(3, RATES, LENGTHS)
    draws = [sequential.draw(n) for n in range(2 * CHUNK + 50)]
    picks = random.Random(0).sample(range(len(draws)), 60)
    fresh = Mixture(3, RATES, LENGTHS)
    assert [fresh.draw(n) for n in picks] == [draws[n] for n in picks]
    counts = Counter(p.source for p in draws)
    for name, rate in RATES.items():
        assert counts[name] / len(draws) == pytest.approx(rate, abs=0.02)


def test_order_does_not_change_between_versions():
    """Frozen on purpose: a change here breaks the resume of every run in the world."""
    mixture = Mixture(50189, RATES, LENGTHS)
    assert [(p.source, p.epoch, p.index) for p in map(mixture.draw, (0, 1, 2, 3, 100, 20000))] == FROZEN
    assert example_rng(1, Draw("a", 2, 3)).bit_generator.random_raw(2).tolist() == FROZEN_RNG


def test_example_rng_depends_on_everything():
    draws = [(1, Draw("a", 0, 0)), (2, Draw("a", 0, 0)), (1, Draw("b", 0, 0)), (1, Draw("a", 1, 0))]
    draws += [(1, Draw("a", 0, 1)), (1, Draw("a", 0, 10)), (1, Draw("a1", 0, 0))]
    values = {example_rng(seed, draw).integers(2**62) for seed, draw in draws}
    assert len(values) == len(draws)


def test_rates():
    sources = {"y": SourceConfig(rate=3), "x": SourceConfig(rate=1), "z": SourceConfig(rate=0)}
    assert normalised_rates(sources) == {"x": 0.25, "y": 0.75}
    for bad in ({}, {"x": SourceConfig(rate=0)}, {"x": SourceConfig(rate=-1)}, {"x": SourceConfig(rate=float("nan"))}):
        with pytest.raises(DataError):
            normalised_rates(bad)


FROZEN = [("c", 0, 16), ("c", 0, 101), ("a", 0, 4), ("c", 0, 77), ("a", 5, 4), ("a", 1423, 6)]
FROZEN_RNG = [16619365898924561727, 2860805890381910180]
