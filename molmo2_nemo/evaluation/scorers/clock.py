"""Reading clocks, as published for PixMo-Clocks: hour, minute and, if the reference has one, second.

A reference is {"hour": 3, "minute": 25, "second": -1}, 24 hours; -1 for a hand that cannot be read. The time is read
around the colons of the response: the number before the first, those after it; "PM" anywhere adds 12 hours. Right if
all agree; where the reference has no time at all, if the response has no colon. Figures of a data set: close (the
hour right, minute and second at most 3 off), and the parts. `"bench": true` in the reference, for clock benchmarks of
12 hours (COCO, OpenImages, films): "PM" adds nothing, 12 hours are 0, 60 minutes are 0, close is at most 1 off, over
the hour too.

>>> noon = {"hour": 12, "minute": 5, "second": -1}
>>> [SCORER.score(text, [noon]).value for text in ("12:05", "The time is 12:05 AM.", "12:06", "five past twelve")]
[1.0, 1.0, 0.0, 0.0]
>>> SCORER.score("The time is 12:06", [noon]).details["close"]
True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.groups import mean_of
from molmo2_nemo.evaluation.reference_fields import object_reference

NONE, HALF_DAY = -1, 12 * 60  # no such hand; minutes
CLOSE, CLOSE_BENCH = 3, 1  # minutes or seconds
FIGURES = ("close", "hour", "minute", "second", "minute close", "second close", "declined")


def part(response: str, place: int) -> int | None:
    """The number of the hour (place 0), minute or second in a response; None if there is none."""
    parts = response.split(":")
    words = parts[place].split() if place < len(parts) else []
    try:
        return int(words[0 if place else -1])
    except (ValueError, IndexError):
        return None


def read_hour(response: str, bench: bool) -> int | None:
    hour = part(response, 0)
    if hour is None:
        return None
    if bench:
        return hour - 12 if hour >= 12 else hour
    return hour + 12 if "PM" in response else hour


def compare(response: str, hour: int, minute: int, second: int, bench: bool) -> dict[str, bool]:
    """What of a time a response has right."""
    ours_hour, ours, seconds = read_hour(response, bench), part(response, 1), part(response, 2)
    ours = 0 if bench and ours == 60 else ours
    near = CLOSE_BENCH if bench else CLOSE
    found = {
        "hour": ours_hour == hour or (hour == 0 and ours_hour == 12),
        "minute": ours == minute,
        "minute close": ours is not None and (abs(ours - minute) <= near or (bench and abs(ours - minute) == 59)),
    }
    if second != NONE:
        found |= {"second": seconds == second, "second close": seconds is not None and abs(seconds - second) <= near}
    exact = found["hour"] and found["minute"] and found.get("second", True)
    close = found["hour"] and found["minute close"] and found.get("second close", True)
    if bench and second == NONE and ours_hour is not None and ours is not None:
        close = close or abs(hour * 60 + minute - ours_hour * 60 - ours) == HALF_DAY - 1
    return {"exact": exact, "close": close, **found}


class Clock(Scorer):
    name = "clock"
    title = "hour, minute and second of the time in the response are the reference's"

    def check(self, references: Sequence[Any]) -> None:
        for reference in references:
            object_reference(self.name, reference, {"hour": int, "minute": int, "second": int})

    def score(self, prediction: str, references: Sequence[Any]) -> Score:
        self.check(references)
        response, entry = prediction.strip(), references[0]
        hour, minute, second = entry["hour"], entry["minute"], entry["second"]
        if (hour, minute, second) == (NONE, NONE, NONE):
            declined = ":" not in response
            return Score(float(declined), {"close": declined, "declined": declined})
        bench = bool(entry.get("bench"))
        if bench:
            hour, minute = (0 if hour == 12 else hour), (0 if minute == 60 else minute)
        found = compare(response, hour, minute, second, bench)
        return Score(float(found.pop("exact")), found)

    def figures(self, scores: Sequence[Score]) -> dict[str, float]:
        return mean_of(scores, FIGURES)


SCORER = Clock()
