"""How many tokens a text has: counted with a run's tokenizer, or estimated from its characters.

The estimate follows the byte-level tokenizers of the published models: every digit is a token, a frequent word is one
with the space before it, other scripts take more the rarer they are. What it gives for texts in many languages was
compared with the vocabulary of Qwen; the higher of its two numbers leaves room for others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from molmo2_nemo.data.tokenizer import Molmo2Tokenizer

WORDS = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+")
SIGNS = re.compile(r"[!-/:-@\[-`{-~]+")
ALONE = re.compile(r"[0-9]|[\r\n]+|[ \t](?=[0-9])|[ \t]{2,}")  # a token each
CODES = re.compile(r"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+/=_-]{24,}")  # with letters and digits: base64 and the like
BEYOND = re.compile(r"[^\x00-\x7f]")
# Characters of a script, and what one of them takes: likely, and at most in a text that somebody wrote.
SCRIPTS = tuple(
    (re.compile(f"[{characters}]"), likely, most)
    for characters, likely, most in (
        ("\u00c0-\u024f\u1e00-\u1eff", 0.6, 1.0),  # letters with accents
        ("\u3400-\u9fff\uf900-\ufaff", 0.75, 1.6),  # Chinese characters
        ("\u3000-\u30ff\uff00-\uffef", 0.8, 1.3),  # kana, wide signs
        ("\uac00-\ud7a3", 0.8, 1.6),  # hangul
        ("\u0400-\u04ff", 0.45, 0.8),  # Cyrillic
        ("\u0590-\u06ff", 0.5, 0.9),  # Hebrew, Arabic
        ("\u0370-\u03ff", 0.9, 1.1),  # Greek
        ("\u0e00-\u0e7f", 0.55, 1.6),  # Thai
        ("\u00a0-\u00bf\u2000-\u206f", 1.0, 2.0),  # signs
        ("\u0700-\u0dff\u0e80-\u1dff\u1f00-\u1fff", 1.1, 2.2),  # other alphabets
        ("\U00010000-\U0010ffff", 1.4, 3.0),  # emoji, rare characters
    )
)
REST = (1.2, 2.5)
LEAST = 0.3  # of digits (some vocabularies have numbers of three) and of other scripts; a word is at least one token


@dataclass(frozen=True, slots=True)
class Length:
    """Tokens of a text; all are the same where they were counted."""

    likely: float = 0.0
    most: float = 0.0
    least: float = 0.0  # under any byte-level tokenizer

    def __add__(self, other: Length) -> Length:
        return Length(self.likely + other.likely, self.most + other.most, self.least + other.least)

    @classmethod
    def counted(cls, tokens: int) -> Length:
        return cls(tokens, tokens, tokens)


Measure = Callable[[str], Length]


def estimated(text: str) -> Length:
    """From the characters alone."""
    codes = [run for run in CODES.findall(text) if not run.isalpha() and not run.isdigit()]
    coded = sum(map(len, codes))
    if codes:
        text = CODES.sub(lambda run: run[0] if run[0].isalpha() or run[0].isdigit() else " ", text)
    alone = len(ALONE.findall(text))
    likely, most, least = alone + 0.85 * coded, alone + 1.0 * coded, LEAST * (alone + coded)
    for size, count in Counter(map(len, WORDS.findall(text))).items():
        least += count
        likely += count * _word(size)
        most += count * _longest(size)
    for size, count in Counter(map(len, SIGNS.findall(text))).items():
        likely += count * (0.55 * size if size > 1 else 0.85)
        most += count * (0.75 * size if size > 1 else 1)
    if not text.isascii():
        other = _others(text)
        likely, most, least = likely + other.likely, most + other.most, least + LEAST * other.likely
    return Length(likely, most, least)


def _word(size: int) -> float:
    """Likely tokens of a word of so many letters; one of more than 20 is hardly a word of a language."""
    return 1 + max(size - 6, 0) / 4 if size <= 20 else 0.55 * size


def _longest(size: int) -> float:
    return 1 + max(size - 2, 0) / 2.8 if size <= 20 else 0.7 * size


def _others(text: str) -> Length:
    """Of the characters beside ASCII; letters with accents are parts of words that have been counted."""
    left, likely, most = len(BEYOND.findall(text)), 0.0, 0.0
    for pattern, each, at_most in SCRIPTS:
        count = len(pattern.findall(text))
        left -= count
        likely, most = likely + count * each, most + count * at_most
    return Length(likely + left * REST[0], most + left * REST[1])


@lru_cache(maxsize=2)
def tokenizer_at(name: str) -> Molmo2Tokenizer | None:
    """The tokenizer that a run names, opened once; None where it is not here.

    Raises:
        UserError: it cannot be read.
    """
    return Molmo2Tokenizer.load(name) if name and Molmo2Tokenizer.exists(name) else None
