"""What came of a task: its figures, over all answers and by tag; files and tables of them. No torch here."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import re
import textwrap
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from molmo2_nemo.errors import writing
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.judge import MEASURES
from molmo2_nemo.evaluation.measure import Measure
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.files import atomic

Line = Mapping[str, Any]
Group = Literal["short video QA", "long video QA", "caption", "image QA", "point", "track", "text", "own data"]
LOST = {"failed": "could not be asked and count 0", "unscored": "have no usable reference"}
NUMBER = re.compile(r"(?<![\w.=-])\d+(?:,\d{3})*(?![\w=-]|\.\d)")  # that stands alone, not in a name or a setting
LOCK = ".lock"  # in a folder of results
WIDTH = 80  # columns of a text table
HEAD = 20  # of a column; longer names stand below the table
REMARKS = 4  # of a task, the most frequent ones, that are said below its figures
ASKED = ("max_new_tokens", "temperature", "top_p", "stop", "fps", "max_crops", "high_res")  # settings of a result
GROUPS: tuple[Group, ...] = typing.get_args(Group)


def result_of(name: str, group: str, lines: Sequence[Line], made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a task, as JSON values. `score` is that of its first scorer or, where the questions have several
    (`mixed`), the mean over the questions, each by its own.

    Args:
        lines: of all questions, from `run.evaluate`.
        made_with: settings that the figures depend on, such as frames and limit.
    """
    scorers = list(dict.fromkeys(scorer for line in lines for scorer in line["scores"]))
    found = {scorer: _figures(scorer, lines) for scorer in scorers}
    firsts = [next(iter(line["scores"].items())) for line in lines if line["scores"]]
    lost = sum("failed" in line and not line["scores"] for line in lines)  # of no scorer, as they could not be read
    mixed = lost > 0 or len({scorer for scorer, _ in firsts}) > 1
    first = found[firsts[0][0]]["score"] if firsts else None
    return {
        "task": name,
        "group": group,
        "questions_sha256": digest_of(lines),
        "score": sum(score["value"] for _, score in firsts) / (len(firsts) + lost) if mixed else first,
        "mixed": mixed,
        "scored": len(firsts) + lost,
        "settings": dict(made_with),
        "questions": len(lines),
        "failed": sum("failed" in line for line in lines),
        "unscored": sum("unscored" in line for line in lines),
        "first": {kind: _first(kind, lines) for kind in LOST},
        "remarks": _together(remark for line in lines for remark in line["remarks"]),
        "scores": found,
    }


def digest_of(lines: Sequence[Line]) -> str:
    """A digest of what was asked, by key and references: equal where figures are over the same questions."""
    asked = [(line["key"], line["references"]) for line in lines]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _first(kind: str, lines: Sequence[Line]) -> str | None:
    """The first question that was lost in a way of LOST, and why; None where none was."""
    found = (f"{line['key']}: {line[kind]}" for line in lines if kind in line)
    return next(found, None)


def _together(remarks: Iterable[str]) -> dict[str, int]:
    """How often each remark was made. Those that differ in their numbers alone are one, with the least and the greatest
    of each number."""
    found: dict[str, list[list[int]]] = {}
    for remark in remarks:
        found.setdefault(NUMBER.sub("{}", _escaped(remark)), []).append(
            [int(number.replace(",", "")) for number in NUMBER.findall(remark)]
        )
    counts: Counter[str] = Counter()
    for kind, numbers in found.items():
        counts[kind.format(*(_span(each) for each in zip(*numbers, strict=True)))] += len(numbers)
    return dict(counts)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def figure_of(name: str) -> Scorer | Measure:
    """What made the scores of a name: a scorer, or what a judge is asked for."""
    return MEASURES.get(name) or find_scorer(name)


def _figures(scorer: str, lines: Sequence[Line]) -> dict[str, Any]:
    own = [line for line in lines if scorer in line["scores"]]
    found = _of(scorer, own) | {"figures": figure_of(scorer).figures(_scores(scorer, own))}
    tags: dict[str, dict[str, list[Line]]] = {}
    for line in own:
        for tag, value in line["tags"].items():
            tags.setdefault(tag, {}).setdefault(value, []).append(line)
    return found | {
        "by": {
            tag: {value: _of(scorer, part) for value, part in sorted(values.items())} for tag, values in tags.items()
        }
    }


def _of(scorer: str, lines: Sequence[Line]) -> dict[str, Any]:
    return {"score": figure_of(scorer).aggregate(_scores(scorer, lines)), "answers": len(lines)}


def _scores(scorer: str, lines: Iterable[Line]) -> list[Score]:
    values = (dict(line["scores"][scorer]) for line in lines)
    return [Score(value.pop("value"), value) for value in values]


def main_score(result: Mapping[str, Any]) -> float | None:
    """The task's figure; None where nothing was scored."""
    if "score" in result:
        return None if result["score"] is None else float(result["score"])
    first = next(iter(result["scores"].values()), None)
    return None if first is None else float(first["score"])


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Figures of tasks as a text table, at most 80 columns wide."""
    rows = [("task", "scorer", "answers", "score")]
    notes = []
    for result in results:
        name = called(result)
        for scorer, found in result["scores"].items():
            rows.append((name, scorer, f"{found['answers']:,}", f"{100 * found['score']:.1f} %"))
            name = ""
        if not result["scores"]:
            rows.append((name, "-", "0", "-"))
        if result.get("mixed"):
            rows.append(("", "all questions", f"{result['scored']:,}", f"{100 * result['score']:.1f} %"))
        for kind, said in LOST.items():
            if result[kind]:
                first = f", the first: {' '.join(result['first'][kind].split())[:200]}"
                notes.append(f"{called(result)}: {result[kind]:,} of {result['questions']:,} questions {said}{first}")
        common = sorted(result["remarks"].items(), key=lambda pair: -pair[1])[:REMARKS]
        notes += [
            f"{called(result)}: {count:,} of {result['questions']:,} answers: {remark}" for remark, count in common
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows]
    return "\n".join([*lines, *wrapped(notes)])


def wrapped(lines: Iterable[str]) -> list[str]:
    """Sentences as lines of at most `WIDTH` columns, but for words that are longer."""
    wrapper = textwrap.TextWrapper(WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [part for line in lines for part in wrapper.wrap(line)]


def called(result: Mapping[str, Any]) -> str:
    """The task's name, with the number of frames where it was chosen."""
    frames = result["settings"].get("frames")
    return f"{result['task']}@{frames}" if frames else str(result["task"])


def write_result(folder: Path, result: Mapping[str, Any], lines: Iterable[Line]) -> None:
    """Write FOLDER/<task>.json, <task>.jsonl (the answers; of references' masks, how many there are) and
    <task>-<item>-<place>.jpg (what the model saw of the first ones), all of them or none. Of processes that write
    one task at once, the last has written all of them.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, kept = called(result), []
    with _alone(folder), ExitStack() as files:  # which get their names when all are written, the figures last
        figures, answers = (files.enter_context(atomic(folder / f"{name}.{end}")) for end in ("json", "jsonl"))
        for line in lines:
            line = {**line, "references": [_without_masks(reference) for reference in line["references"]]}
            if (picture := line.pop("picture", None)) is not None:
                line["picture"] = f"{name}-{line['item']}-{line['place']}.jpg"
                file = files.enter_context(atomic(folder / line["picture"]))
                file.write_bytes(base64.b64decode(picture))
            kept.append(json.dumps(line, ensure_ascii=False) + "\n")
        with writing(folder / f"{name}.jsonl"):
            answers.write_text("".join(kept), encoding="utf-8")
        with writing(folder / f"{name}.json"):
            figures.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside the block no other process writes results to the folder, where its file system has locks."""
    with (folder / LOCK).open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _without_masks(reference: Any) -> Any:
    if not isinstance(reference, dict) or not reference.get("masks"):
        return reference
    return {**reference, "masks": len(reference["masks"])}


def groups_of(scores: Mapping[str, float | None], groups: Mapping[str, str]) -> dict[str, float]:
    """The mean of the tasks' figures in each group, 0 to 1, in the order of GROUPS.

    Args:
        scores: of each task, 0 to 1; None where nothing was scored.
        groups: of each task.
    """
    values: dict[str, list[float]] = {}
    for task, score in scores.items():
        if score is not None:
            values.setdefault(groups[task], []).append(score)
    known = dict.fromkeys((*GROUPS, *values))
    return {group: sum(values[group]) / len(values[group]) for group in known if group in values}


def comparison(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Several models side by side, in percent: a row for each task, and one for each group's mean, which is over the
    tasks that all models have. Below, what makes figures of a row unlike each other. At most `WIDTH` columns wide:
    models that do not fit are in further tables, and long names stand below as [1], [2] and so on."""
    heads = {name: name if len(name) <= HEAD else f"[{n}]" for n, name in enumerate(runs, start=1)}
    named = [f"{head} {name}" for name, head in heads.items() if head != name]
    runs = {heads[name]: results for name, results in runs.items()}
    scores = {name: {called(r): main_score(r) for r in results} for name, results in runs.items()}
    groups = {called(r): r["group"] for results in runs.values() for r in results}
    common = {task for task in groups if all(own.get(task) is not None for own in scores.values())}
    means = {name: groups_of({t: s for t, s in own.items() if t in common}, groups) for name, own in scores.items()}
    rows: list[tuple[str, ...]] = [("", *runs)]
    for group in dict.fromkeys((*GROUPS, *groups.values())):
        tasks = sorted(task for task, own in groups.items() if own == group)
        if tasks:
            rows.append((group, *(_percent(means[name].get(group)) for name in runs)))
            for task in tasks:
                rows.append((f"  {task}", *(_percent(scores[name].get(task)) for name in runs)))
                rows += _by_scorer(task, runs)
    return "\n".join([*_blocks(rows), *named, *wrapped(unlike(runs))])


def _blocks(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, or of several with some of the columns each, a blank line between them: as many columns as
    `WIDTH` has room for, and at least one. The first column is in all of them."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines: list[str] = []
    first = 1
    while first < len(widths):
        last = first + 1
        while last < len(widths) and widths[0] + sum(2 + w for w in widths[first : last + 1]) <= WIDTH:
            last += 1
        chosen = [0, *range(first, last)]
        lines += [""] * bool(lines)
        lines += [_row([row[i] for i in chosen], [widths[i] for i in chosen]) for row in rows]
        first = last
    return lines


def unlike(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A line for each task whose figures are not of the same questions, or of questions asked otherwise, and for each
    with questions that could not be asked or scored."""
    found = []
    for task in sorted({called(r) for results in runs.values() for r in results}):
        own = {name: r for name, results in runs.items() for r in results if called(r) == task}
        counts, digests = ([r.get(key) for r in own.values()] for key in ("questions", "questions_sha256"))
        if any(len({value for value in values if value is not None}) > 1 for values in (counts, digests)):
            alike: dict[Any, list[str]] = {}
            for name, count, digest in zip(own, counts, digests, strict=True):
                alike.setdefault((count, digest), []).append(name)
            each = "; ".join(f"{'-' if n is None else n} of {', '.join(names)}" for (n, _), names in alike.items())
            found.append(f"{task}: not the same questions or references ({each})")
        for key in ASKED:
            values = [r["settings"].get(key) for r in own.values()]
            if any(value != values[0] for value in values):
                found.append(f"{task}: {key} is not the same ({_each(own, values)})")
        for kind, said in LOST.items():
            values = [r.get(kind) for r in own.values()]
            if any(values):
                found.append(f"{task}: questions that {said}: {_each(own, values)}")
    return found


def _each(names: Iterable[str], values: Iterable[Any]) -> str:
    """What each model has; null (of an older file, or a setting left as the run has it) is a dash."""
    return ", ".join(f"{name} {'-' if value is None else value}" for name, value in zip(names, values, strict=True))


def _by_scorer(task: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """A row for each scorer of a task whose questions have several."""
    own = {name: next((r for r in results if called(r) == task), {}) for name, results in runs.items()}
    if not any(result.get("mixed") for result in own.values()):
        return []
    found = {name: result.get("scores", {}) for name, result in own.items()}
    scorers = dict.fromkeys(scorer for scores in found.values() for scorer in scores)
    rows = []
    for scorer in scorers:
        rows.append((f"    {scorer}", *(_percent(found[name].get(scorer, {}).get("score")) for name in runs)))
    return rows


def _row(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([f"{row[0]:{widths[0]}}", *cells]).rstrip()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
