"""Which questions ask for a number of things one could point at."""

import pytest

from data_prep.sources.counting import asks_for_count

COUNTING = [
    "How many cars are in the image?",
    "Look closely. How many people wear a hat, and why?",
    "howmany dogs",
    "Count the birds.",
    "Please tally every window in this picture",
    "There are ___ apples on the table.",
    "What is the total number of seats?",
    "What's the exact count of trees?",
    "State the number of lamps",
    "First line\nhow many chairs",
]
NOT_COUNTING = [
    "What color is the car?",
    "How many years old is this building?",
    "How many more people are on the left?",
    "How many kilometers is it to the station?",
    "how many Minutes does the clock show",
    "How many square feet is the flat?",
    "Approximately how many people are there?",
    "Describe the image but do not count the people.",
    "What is the amount of money on the bill?",
    "What is the total number of dollars?",
    "The account the user opened",
    "How many",
    "",
]


@pytest.mark.parametrize("question", COUNTING)
def test_counting(question):
    assert asks_for_count(question)


@pytest.mark.parametrize("question", NOT_COUNTING)
def test_not_counting(question):
    assert not asks_for_count(question)


def test_one_countable_thing_is_enough():
    assert asks_for_count("How many days did it take, and how many workers were there?")
