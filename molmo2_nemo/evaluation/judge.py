"""Figures that need a judge: a model behind a URL of the user's, asked after all answers are there, and only then.

The judge's replies are kept in the output folder, so that a rerun asks nothing twice. Answers that it does not judge
are counted and said; the figure is over those that it did, and all other scores stand.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError, nearest, writing
from molmo2_nemo.evaluation.base import Score
from molmo2_nemo.evaluation.caption_f1 import CAPTION_F1
from molmo2_nemo.evaluation.chat import Chat, NoAnswer, Patience
from molmo2_nemo.evaluation.measure import Item, Measure, Read
from molmo2_nemo.rundir.lines import append_line, read_lines

MEASURES: dict[str, Measure] = {measure.name: measure for measure in (CAPTION_F1,)}
REPLIES = "judge.jsonl"  # in the output folder
JUDGED = {"caption_recall": CAPTION_F1.name}  # scorer -> figure of a judge over the same answers
UNANSWERED = 5  # answers in a row that cannot be judged, after which a judge is asked nothing more
USELESS = 2  # replies that do not have the form asked for, after which a question has no answer


def find_measure(name: str) -> Measure:
    """The measure of a name.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    if name not in MEASURES:
        raise UserError(f"a judge has no figure {name!r}; {nearest(name, MEASURES)}")
    return MEASURES[name]


class Judge:
    """A judge, and its replies so far.

    Args:
        url: where the API of an OpenAI-compatible server begins, such as http://localhost:8000/v1.
        model: the judge's name there.
        folder: gets judge.jsonl.
        patience: how the server is asked.

    Raises:
        UserError: not a URL, no name, or a folder that cannot be made.
    """

    def __init__(self, url: str, model: str, folder: Path, patience: Patience | None = None) -> None:
        self.chat = Chat(url, model, patience)
        self.asked = 0  # questions that went to the server
        self.given = 0  # answers that were there to judge
        self.causes: dict[str, Counter[str]] = {}  # figure -> why answers were not judged -> how many
        self._path = folder / REPLIES
        self._replies = {line["asked"]: line["reply"] for line in read_lines(self._path, asked=str, reply=str)}
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = defaultdict(
            threading.Lock
        )  # of questions, so that none is asked twice

    def score(self, name: str, items: Sequence[Item]) -> dict[str, Score | None]:
        """Scores by key; None for those that the judge did not judge, which `said` counts.

        Raises:
            UserError: no such figure.
        """
        measure = find_measure(name)
        self.causes[name] = Counter()
        row = _Row()
        pool = ThreadPoolExecutor(self.chat.patience.at_once, thread_name_prefix="judge")
        try:
            scores = list(pool.map(lambda item: self._judged(measure, item, row), items))
        except BaseException:
            row.over = True
            self.chat.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return {item.key: score for item, score in zip(items, scores, strict=True)}

    def score_lines(self, lines: Sequence[dict[str, Any]]) -> list[str]:
        """Adds a judge's scores to the scores of answered questions, where one goes with a scorer's.

        Args:
            lines: key, question, answer, references and scores (scorer -> value and details) of each.

        Returns:
            What to tell the user about answers that were not judged.
        """
        said = []
        for scorer, name in JUDGED.items():
            own = (line for line in lines if scorer in line["scores"])
            chosen = {f"{number}: {line['key']}": line for number, line in enumerate(own)}
            asked = [Item(key, x["question"], x["answer"], x["references"]) for key, x in chosen.items()]
            self.given += len(asked)
            for key, score in self.score(name, asked).items():
                line = chosen[key]
                if score is not None:
                    line["scores"][name] = {"value": score.value, **score.details}
            said += self.said(name, len(asked))
        return said

    def said(self, name: str, count: int) -> list[str]:
        """What to tell the user about answers that were not judged, of `count`."""
        causes = self.causes.get(name, Counter())
        if not causes:
            return []
        why = "; ".join(f"{n:,}: {cause}" for cause, n in causes.most_common(3))
        left = count - causes.total()
        over = f"the figure is over the other {left:,}" if left else "there is no figure"
        return [f"{name}: the judge did not judge {causes.total():,} of {count:,} answers, so {over} ({why})"]

    def _judged(self, measure: Measure, item: Item, row: _Row) -> Score | None:
        if row.over:
            cause = "not asked, since the judge did not answer before"
        else:
            try:
                measure.check(item.references)
                score = measure.score(lambda question, read: self._ask(item.key, question, read), item)
                row.failed = 0
                return score
            except UserError as error:
                cause = str(error)
            except NoAnswer as error:
                cause = str(error)
                row.failed += 1
                row.over = row.over or error.hopeless or row.failed >= UNANSWERED
        with self._lock:
            self.causes[measure.name][cause] += 1
        return None

    def _ask(self, key: str, question: str, read: Callable[[str], Read | None]) -> Read:
        """What a question's reply says, from the file or the server; what cannot be read is asked again, never kept.

        Raises:
            NoAnswer: no reply, or none of the form asked for.
        """
        messages = [{"role": "user", "content": question}]
        asked = hashlib.sha256(json.dumps([self.chat.url, self.chat.model, messages]).encode()).hexdigest()
        with self._lock:
            turn = self._turns[asked]
        with turn:
            if asked in self._replies and (found := read(self._replies[asked])) is not None:
                return found
            for _ in range(USELESS):
                reply = self.chat.ask(messages)
                with self._lock:
                    self.asked += 1
                if (found := read(reply)) is not None:
                    self._keep(asked, key, reply)
                    return found
        raise NoAnswer(f"a reply that is not of the form asked for: {' '.join(reply.split())[:80]!r}")

    def _keep(self, asked: str, key: str, reply: str) -> None:
        with self._lock, writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._replies[asked] = reply
            append_line(self._path, {"asked": asked, "for": key, "model": self.chat.model, "reply": reply})


@dataclass
class _Row:
    """Answers in a row that could not be judged."""

    failed: int = 0
    over: bool = False  # nothing more is asked
