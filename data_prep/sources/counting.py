"""Whether a question asks for a number of things. Molmo2's data add a request not to point to such questions of PixMo.

The test prefers false positives. Quantities that cannot be pointed at are excluded: time, length, money, speed, volume,
weight, comparisons.
"""

from __future__ import annotations

import re

# A counted word that starts with one of these is a quantity.
QUANTITIES = (
    *("year", "month", "week", "days", "hour", "minutes", "seconds", "milliseconds", "microseconds", "nanoseconds"),
    *("meters", "metres", "kilometers", "centimeters", "millimeters", "decimeters", "nanometers", "micrometers"),
    *("acres", "leagues", "fathoms", "nautical miles", "hectares", "inches", "square ", "sq ", "ft", "miles", "yards"),
    *("passing yards", "dollars", "cents", "pounds", "euros", "mph", "kph"),
    *("more", "fewer", "less", "likes"),
    *("cubic", "gallons", "quarts", "pints", "fluid ounces", "liters", "milliliters", "centiliters"),
    *("weight", "grams", "kilograms", "milligrams", "micrograms", "tons", "ounces", "ways", "different ways"),
    *("degrees", "calories", "hertz", "horsepower", "psi", "atmospheres", "watts", "kilowatts", "megawatts"),
    *("bytes", "kilobytes", "megabytes", "gigabytes", "terabytes"),
)
UNCOUNTED = (*QUANTITIES, "money", "the")  # after "the number of"

_HOW_MANY = re.compile(r"\bhow ?many (?=\w)")
_DO_COUNT = re.compile(r"(?<!do not )\b(?:count|tally) (?:all|every|each|the) ")
_BLANK = re.compile(r"\b(?:there are|a total of) _{3,4}(?!_)")
_NUMBER_OF = re.compile(
    r"\b(?:what|(?:what's|what (?:is|was|were)|states?|indicates?) the(?: exact| precise)?)"
    r" (?:total )?(?:count|number|num|amount|total) of (?=\w)"
)


def asks_for_count(question: str) -> bool:
    """Whether the question could be answered by pointing at things and counting them."""
    text = question.lower()
    if text.startswith("approximately"):
        return False
    if _DO_COUNT.search(text) or _BLANK.search(text):
        return True
    counted = ((_HOW_MANY, QUANTITIES), (_NUMBER_OF, UNCOUNTED))
    return any(not text.startswith(words, hit.end()) for pattern, words in counted for hit in pattern.finditer(text))
