"""What came of a task: its figures, over all answers and by tag; files and tables of them. No torch here."""

from __future__ import annotations

import base64
import json
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from molmo2_nemo.errors import UserError, read_text
from molmo2_nemo.evaluation.base import Score, Scorer
from molmo2_nemo.evaluation.judge import MEASURES
from molmo2_nemo.evaluation.measure import Measure
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.files import write_json, write_text

Line = Mapping[str, Any]
Group = Literal["short video QA", "long video QA", "caption", "image QA", "point", "track", "text", "own data"]
REMARKS = 4  # of a task, the most frequent ones, that are said below its figures
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
        "score": sum(score["value"] for _, score in firsts) / (len(firsts) + lost) if mixed else first,
        "mixed": mixed,
        "scored": len(firsts) + lost,
        "settings": dict(made_with),
        "questions": len(lines),
        "failed": sum("failed" in line for line in lines),
        "unscored": sum("unscored" in line for line in lines),
        "remarks": dict(Counter(_kind(remark) for line in lines for remark in line["remarks"])),
        "scores": found,
    }


def _kind(remark: str) -> str:
    """A remark without its numbers, so that equal ones can be counted."""
    return " ".join("N" if word.strip(",.()").replace(",", "").isdigit() else word for word in remark.split())


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
        for kind, said in (("failed", "could not be asked and count 0"), ("unscored", "have no usable reference")):
            if result[kind]:
                notes.append(f"{called(result)}: {result[kind]:,} of {result['questions']:,} questions {said}")
        common = sorted(result["remarks"].items(), key=lambda pair: -pair[1])[:REMARKS]
        notes += [
            f"{called(result)}: {count:,} of {result['questions']:,} answers: {remark}" for remark, count in common
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows]
    return "\n".join(lines + notes)


def called(result: Mapping[str, Any]) -> str:
    """The task's name, with the number of frames where it was chosen."""
    frames = result["settings"].get("frames")
    return f"{result['task']}@{frames}" if frames else str(result["task"])


def write_result(folder: Path, result: Mapping[str, Any], lines: Iterable[Line]) -> None:
    """Write FOLDER/<task>.json, <task>.jsonl (the answers; of references' masks, how many there are) and
    <task>-<item>-<place>.jpg (what the model saw of the first ones), each whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, kept = called(result), []
    for line in lines:
        line = {**line, "references": [_without_masks(reference) for reference in line["references"]]}
        if (picture := line.pop("picture", None)) is not None:
            line["picture"] = f"{name}-{line['item']}-{line['place']}.jpg"
            (folder / line["picture"]).write_bytes(base64.b64decode(picture))
        kept.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(folder / f"{name}.jsonl", "".join(kept))
    write_json(folder / f"{name}.json", result)


def _without_masks(reference: Any) -> Any:
    if not isinstance(reference, dict) or not reference.get("masks"):
        return reference
    return {**reference, "masks": len(reference["masks"])}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """What `write_result` wrote there, by name.

    Raises:
        UserError: a damaged file.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}); remove it and evaluate again") from None
        if isinstance(value, dict) and {"task", "group", "scores", "settings"} <= set(value):
            found.append(value)
    return found


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
    tasks that all models have."""
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
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(_row(row, widths) for row in rows)


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
