"""Recall of a caption by rule: the share of the reference's content words that the caption has. English.

A definition of ours, to follow a model during training at no cost; it knows no synonyms, no order and no negation. The
published figure asks a judge model about statements (`molmo2 evaluate --judge`, caption_f1).

It is ROUGE-1 (Lin 2004, aclanthology.org/W04-1013) over content words: words are runs of ASCII letters and digits in
lower case (of `dog's`, `dog`; negated verbs like `isn't` are dropped), without the function words below, and without a
plural's ending by the three rules of Harman's S-stemmer (1991: ies -> y, es -> e, s -> none). A word counts as often as
it stands in both texts:

    recall    = sum over words of min(times in caption, times in reference) / words of the reference
    precision = the same sum / words of the caption

The score is the recall of the reference with the highest one; a reference without a content word (of another language,
for instance) is none to compare with.
Recall favours long captions, so the figures are the mean `precision` and the mean `f1` of the same pairs.

A reference is a text, or an object with a "text".

>>> SCORER.score("Two dogs run.", ["A dog runs on the grass and rests."]).details["recall"]
0.5
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.text import text_of

WORD = re.compile(r"[a-z]+n['’]t\b|[a-z0-9]+(?:['’][a-z]+)?")
FUNCTION_WORDS = frozenset(
    """a about above across after again against all also although am among an and any are around as at be because been
    before behind being below beside between both but by can could did do does doing down during each either else even
    ever every few for from further had has have having he her here hers herself him himself his how however i if in
    into is it its itself just let may me might more most much must my myself neither no nor not now of off on once only
    onto or other our ours ourselves out over own per quite rather same shall she should since so some such than that
    the their theirs them themselves then there these they this those though through to too toward towards under until
    up upon us very was we were what when where whether which while who whom whose why will with within without would
    yet you your yours yourself yourselves""".split()
)


def stem(word: str) -> str:
    """A word without its plural ending.

    >>> [stem(word) for word in ("berries", "horses", "dogs", "glass", "bus")]
    ['berry', 'horse', 'dog', 'glass', 'bus']
    """
    if word.endswith("ies"):
        return word if word.endswith(("eies", "aies")) else f"{word[:-3]}y"
    if word.endswith("es"):
        return word if word.endswith(("aes", "ees", "oes")) else word[:-1]
    return word[:-1] if word.endswith("s") and not word.endswith(("us", "ss")) else word


def content_words(text: str) -> Counter[str]:
    """How often a text has each content word."""
    found = (word for word in WORD.findall(text.lower()) if not word.endswith(("n't", "n’t")))
    words = (re.split("['’]", word)[0] for word in found)
    return Counter(stem(word) for word in words if word not in FUNCTION_WORDS)


class CaptionRecall(Scorer):
    name = "caption_recall"
    title = "share of the reference's content words that the caption has (English)"

    def check(self, references: Sequence[Any]) -> None:
        _expected(references)

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        said = content_words(prediction)
        return max((_compared(said, expected) for expected in _expected(references)), key=lambda s: s.value)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return {
            name: sum(score.details.get(name, 0.0) for score in scores) / len(scores) for name in ("precision", "f1")
        }


def _expected(references: Sequence[Any]) -> list[Counter[str]]:
    """The content words of each reference that has some."""
    found = [words for reference in references if (words := content_words(text_of(reference)))]
    if not found:
        raise UserError(f"caption_recall: no content word of English in the reference {text_of(references[0])[:80]!r}")
    return found


def _compared(said: Counter[str], expected: Counter[str]) -> Score:
    both = (said & expected).total()
    recall = both / expected.total()
    precision = both / said.total() if said else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return Score(recall, {"recall": recall, "precision": precision, "f1": f1})


SCORER = CaptionRecall()
