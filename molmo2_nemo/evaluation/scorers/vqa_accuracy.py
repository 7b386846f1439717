"""VQA accuracy (arXiv 1505.00468; VQA v2, arXiv 1612.00837): correct to the degree that humans agree with it.

min(1, m / 3), where m of the humans (10 as published) gave the prediction, as the published evaluation computes it. The
leave-one-out accuracy of the VQA challenge, which averages min(1, m' / 3) over leaving one human out, is the figure
`leave one out` of a data set; it is up to 0.07 lower.

Before, prediction and references are processed by the rules of visualqa.org/evaluation: lower case, no articles,
number words to ten as digits, contractions that lack an apostrophe with it, no periods but decimal points, other
punctuation a space (or nothing, beside a space or where a number has a comma). The answer is what `final_answer`
finds in the response.

>>> SCORER.score("Two.", ["2", "two", "three", "2 dogs"] ).value == 2 / 3
True
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.groups import mean_of
from molmo2_nemo.evaluation.reference_fields import TextScorer

ENOUGH = 3  # humans who must agree for an answer to be fully correct
ARTICLES = ("a", "an", "the")
NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
MARKS = ';/[]"{}()=+\\_-><@`,?!'  # apostrophes and colons stay
CONTRACTED = """'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've""".split()


def lacking_one(word: str) -> list[str]:
    """A word without one of its apostrophes, for each of them."""
    return [word[:i] + word[i + 1 :] for i, character in enumerate(word) if character == "'"]


CONTRACTIONS = {lacking: word for word in CONTRACTED for lacking in lacking_one(word)}
CONTRACTIONS["somebody'd"] = "somebodyd"  # as published


def processed(answer: str) -> str:
    """An answer in the normal form in which answers are compared."""
    answer = answer.replace("\n", " ").replace("\t", " ").lower().strip()
    comma = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in MARKS:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or comma else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


class VqaAccuracy(TextScorer):
    name = "vqa_accuracy"
    title = "humans who gave the answer, over 3 and at most 1"
    min_references = ENOUGH  # with fewer, no answer can be fully right

    def compare(self, answer: str, references: Sequence[str]) -> Score:
        ours = processed(answer)
        same = [processed(reference) == ours for reference in references]
        others = [sum(same) - itself for itself in same]  # humans who agree with the prediction, with one left out
        left_out = sum(min(1.0, n / ENOUGH) for n in others) / len(others)
        return Score(min(1.0, sum(same) / ENOUGH), {"agree": sum(same), "leave one out": left_out})

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return mean_of(scores, ["leave one out"])


SCORER = VqaAccuracy()
