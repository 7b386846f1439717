"""How tokens are drawn: frequencies against the probabilities asked for, and draws that depend on nothing else."""

import numpy as np
import pytest
import torch

from molmo2_nemo.errors import UserError
from molmo2_nemo.inference.choose import Chooser, nucleus
from molmo2_nemo.inference.sampling import Sampling, stopped


def brute_nucleus(row, top_p):
    """The most probable tokens, taken one at a time until they have top_p."""
    kept, total = [], 0.0
    for token in sorted(range(len(row)), key=lambda token: -row[token]):
        if total >= top_p:
            break
        kept.append(token)
        total += row[token]
    return [row[token] if token in kept else 0.0 for token in range(len(row))]


def test_nucleus_against_one_token_at_a_time():
    rng = np.random.default_rng(3)
    for _ in range(200):
        rows = rng.dirichlet(np.full(9, 0.4), size=3)
        top_p = float(rng.uniform(0.05, 0.99))
        found = nucleus(torch.tensor(rows), top_p).tolist()
        assert found == [pytest.approx(brute_nucleus(list(row), top_p)) for row in rows]


def test_frequencies_follow_temperature_and_nucleus():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    expected = torch.softmax(logits[0] / 0.7, 0)
    expected[3] = 0
    assert expected[:2].sum() < 0.97 <= expected.sum(), "top_p takes the first three"
    draw = Chooser(Sampling(temperature=0.7, top_p=0.97, seed=1), [0])
    counts = torch.bincount(torch.cat([draw(logits, [0]) for _ in range(4000)]), minlength=4)
    assert counts[3] == 0
    assert (counts / 4000 - expected / expected.sum()).abs().max() < 0.03  # more than 3.5 standard deviations


def test_draws_depend_on_seed_and_number_alone():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.0, seed=7)
    together = Chooser(sampling, [4, 5, 6])
    alone = Chooser(sampling, [5])
    first = [together(logits, [0, 1, 2]) for _ in range(5)]
    assert [tokens[1] for tokens in first] == [alone(logits[1:2], [0])[0] for _ in range(5)]
    other = Chooser(Sampling(temperature=1.0, seed=8), [4, 5, 6])
    assert [t.tolist() for t in first] != [other(logits, [0, 1, 2]).tolist() for _ in range(5)]


@pytest.mark.parametrize("temperature", [1e-3, 1e-45, 1e-300, 5e-324])
def test_any_temperature_above_0_draws(temperature):
    """Towards 0 it is the most probable token, and of equal ones each."""
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 5.0, 1.0]])
    draw = Chooser(Sampling(temperature=temperature, top_p=0.9, seed=3), [0, 1])
    found = [draw(logits, [0, 1]).tolist() for _ in range(60)]
    assert {first for first, _ in found} == {1} and {second for _, second in found} == {0, 1}


def test_without_temperature_the_most_probable_token_is_taken():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert Chooser(Sampling(), [0, 1])(logits, [0, 1]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "stop", "found"),
    [
        ("a cat. A dog", (". A", "cat"), "a "),
        ("a cat", ("dog",), None),
        ("a cat", (), None),
        ("\nUser: x", ("\nUser:",), ""),
    ],
)
def test_stop_texts(text, stop, found):
    assert stopped(text, stop) == found


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 0.5}, "--top-p 0.5 without --temperature"),
        ({"stop": ("a", "")}, "--stop"),
    ],
)
def test_wrong_numbers(given, seen):
    with pytest.raises(UserError, match=seen):
        Sampling(**given)
