"""Runs tasks on a model: the items are dealt out to the data-parallel ranks, and every question is scored once.

Ranks that share a model work on the same items. An item that cannot be read, and a question whose media cannot, are
answers of value 0 with the reason beside them.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.example import Example
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.drawn import shown_time, with_marks
from molmo2_nemo.evaluation.kept import KeptAnswers
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.task import Items, Question, Task
from molmo2_nemo.inference.engine import Generator
from molmo2_nemo.inference.generate import Asked, answers, remarks_on
from molmo2_nemo.inference.ranks import gathered, place, runs_of
from molmo2_nemo.inference.sampling import Sampling

PLACES = 1 << 20  # questions of an item, at most
ROUND = 8  # items of a replica between two looks for signals
# Keys of an answered line.
ORDER = ("key", "question", "answer", "item", "place", "tags", "references", "picture", "remarks", "tokens")
PICTURES = 4  # items of a task whose picture is kept, to be shown in reports
Line = dict[str, Any]
# Whether the run is to end here, and whether any rank has the wish that is passed; see training/stopping.py.
Leaves = Callable[[bool], tuple[bool, bool]]


def evaluate(
    task: Task,
    items: Items,
    count: int,
    generator: Generator,
    builder: ExampleBuilder,
    sampling: Sampling,
    advance: Callable[[int], None] = lambda done: None,
    leaves: Leaves | None = None,
    kept: KeptAnswers | None = None,
) -> list[Line] | None:
    """The answered and scored questions of the first `count` items, in order, on every rank; None where a signal came
    meanwhile. A collective of all ranks.

    Args:
        advance: called with the number of each item that this rank begins.
        leaves: asked by all ranks after every few items whether the run is to end.
        kept: answers that are there already, and where those to come are kept.

    Returns:
        Lines of JSON values: item, place (of the question in the item), key, tags, question, answer, references,
        scores (scorer -> value and details), remarks; `failed`, the reason, where the model could not be asked;
        `unscored` where a reference is of no use.
    """
    own = place()
    mine = runs_of(count, own)
    lines: list[Line] = []
    rounds = iter([mine] if leaves is None else [mine[i : i + ROUND] for i in range(0, len(mine), ROUND)])
    while True:
        numbers = next(rounds, None)
        if leaves is not None:
            ended, more = leaves(numbers is not None)
            if ended:
                return None
            if not more:
                break
        elif numbers is None:
            break
        if numbers is not None:
            lines += _answered(task, items, numbers, generator, builder, sampling, advance, kept)
    return sorted(gathered(lines), key=order)


def order(line: Line) -> tuple[int, int]:
    return line["item"], line["place"]


def _answered(
    task: Task,
    items: Items,
    numbers: Sequence[int],
    generator: Generator,
    builder: ExampleBuilder,
    sampling: Sampling,
    advance: Callable[[int], None],
    kept: KeptAnswers | None,
) -> Iterator[Line]:
    there: list[Line] = []  # that need no answer

    def asked() -> Iterator[Asked]:
        for item in numbers:
            advance(item)
            try:
                questions = items.questions(item, builder)
            except Exception as error:  # noqa: BLE001 - hostile media may raise anything
                there.append(_failed(task, (item, 0), error))
                continue
            for nth, question in enumerate(questions):
                number = item * PLACES + nth  # what draws follow from
                line, digest = _line((item, nth), question), ""
                if kept is not None:
                    digest = kept.digest(question.prompt, number)
                    if (found := kept.find(digest)) is not None:
                        there.append(scored(task, question, _ordered(line | found)))
                        continue
                try:
                    example = generator.seen.example(question.prompt, builder)
                except Exception as error:  # noqa: BLE001 - hostile media may raise anything
                    there.append(_failed(task, (item, nth), error, question))
                    continue
                if item < PICTURES and len(example.crops):
                    line["picture"] = picture(example, shown_time(question.references))
                remarks = remarks_on(example, builder.config)
                yield line | {"remarks": remarks, "asked": (question, digest)}, example, number

    for line, _ in answers(generator, asked(), sampling):
        question, digest = line.pop("asked")
        if kept is not None:
            kept.add(digest, line)
        yield scored(task, question, _ordered(line))
    yield from there


def _line(place: tuple[int, int], question: Question | None) -> Line:
    found: Line = {"item": place[0], "place": place[1], "key": f"item {place[0]}"}
    if question is None:
        return found | {"tags": {}, "question": "", "references": []}
    asked = {"tags": dict(question.tags), "question": question.prompt.question, "references": list(question.references)}
    return found | {"key": question.key} | asked


def _ordered(line: Line) -> Line:
    """The same, with its keys in the order of ORDER."""
    return {name: line[name] for name in ORDER if name in line}


def _failed(task: Task, place: tuple[int, int], error: Exception, question: Question | None = None) -> Line:
    """An answer that the model could not be asked for: of value 0."""
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    names = (question.scorers if question else ()) or task.scorers
    values: dict[str, Any] = {name: {"value": 0.0} for name in names}
    return _line(place, question) | {"answer": "", "scores": values, "failed": said[:500], "remarks": []}


def picture(example: Example, time: float | None = None) -> str:
    """What the model sees: its first image as a whole, or a frame of a video. JPEG, in base64.

    Args:
        time: seconds; the frame nearest to it is shown, by default the middle one.
    """
    from molmo2_nemo.preview.draw import jpeg, unpatchify

    times = example.info.get("frame_times")
    first = 0 if example.info.get("images") else len(example.crops) // 2
    if times and time is not None:
        first = min(range(len(times)), key=lambda i: abs(times[i] - time))
    return base64.b64encode(jpeg(unpatchify(example.crops[first : first + 1])[0], side=256)).decode()


def scored(task: Task, question: Question, line: Line) -> Line:
    """The line of an answer, with its scores."""
    scores: dict[str, Any] = {}
    for name in question.scorers or task.scorers:
        scorer = find_scorer(name)
        try:
            if len(question.references) < scorer.min_references:
                raise UserError(
                    f"{name} needs {scorer.min_references} references, there are {len(question.references)}"
                )
            scorer.check(question.references)
            score = scorer.score(line["answer"], question.references)
        except UserError as error:
            line["unscored"] = str(error)[:500]
            continue
        assert 0 <= score.value <= 1, (name, score)
        scores[name] = {"value": score.value, **score.details}
    if "picture" in line:
        line["picture"] = with_marks(line["picture"], line["answer"], question.references)
    return line | {"scores": scores}
