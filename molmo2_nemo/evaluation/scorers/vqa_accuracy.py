"""VQA accuracy (arXiv 1505.00468; VQA v2, arXiv 1612.00837): correct to the degree that humans agree with it.

For each of the n humans (10 as published), min(1, m / 3), where m of the other n - 1 gave the prediction; their mean.
Before, prediction and references are processed by the rules of visualqa.org/evaluation: lower case, no articles, number
words to ten as digits, contractions with their apostrophe, no periods but decimal points, other punctuation a space (or
nothing, beside a space or where a number has a comma).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score, Scorer

ENOUGH = 3  # humans who must agree for an answer to be fully correct
ARTICLES = ("a", "an", "the")
NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
MARKS = ';/[]"{}()=+\\_-><@`,?!'  # apostrophes and colons stay
CONTRACTED = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
how's i'm i've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've""".split()
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED}


def processed(answer: str) -> str:
    """An answer in the normal form in which answers are compared."""
    answer = " ".join(answer.lower().split())
    comma = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in MARKS:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or comma else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


class VqaAccuracy(Scorer):
    name = "vqa_accuracy"
    title = "humans who gave the answer, over 3 and at most 1, averaged over leaving one human out"
    min_references = ENOUGH + 1  # with fewer, no answer can be right

    def score(self, prediction: str, references: Sequence[str]) -> Score:
        ours = processed(prediction)
        same = [processed(reference) == ours for reference in references]
        others = [sum(same) - itself for itself in same]  # humans who agree with the prediction, with one left out
        return Score(sum(min(1.0, n / ENOUGH) for n in others) / len(others), {"agree": sum(same)})


SCORER = VqaAccuracy()
