"""Text normalisation and edit distance, for scorers."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

from molmo2_nemo.errors import UserError

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
ANSWER = "Answer:"


def final_answer(response: str) -> str:
    """The answer in a response, as the published evaluation takes it: of a response with "Answer:", what follows it
    (up to the next one); else of its lines the most frequent, or the first of those, with single spaces.

    >>> final_answer("There are two. Answer: 2"), final_answer("a  cat"), final_answer("3 dogs\\n2 dogs\\n2 dogs")
    ('2', 'a cat', '2 dogs')
    """
    response = response.strip()
    if ANSWER in response:
        return response.split(ANSWER)[1].strip()
    lines = [" ".join(line.split()) for line in response.split("\n")]
    times = Counter(lines)
    return max(lines, key=lambda line: times[line])


def normalised(text: str) -> str:
    """Lower case without ASCII punctuation, articles and surplus whitespace, as SQuAD compares answers (arXiv
    1606.05250)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def text_of(reference: Any) -> str:
    """The text of a reference that is one, or an object with a "text".

    Raises:
        UserError: neither.
    """
    text = reference.get("text") if isinstance(reference, dict) else reference
    if not isinstance(text, str):
        raise UserError(f'the reference is {reference!r}; expected a text or {{"text": ...}}')
    return text


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: fewest insertions, deletions and replacements of a character that turn `a` into `b`."""
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        row = [i]
        for j, right in enumerate(b, start=1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (left != right)))
        previous = row
    return previous[-1]
