"""Answers of a run's last evaluations for its report: what the model saw, the question, the answer, what was right."""

from __future__ import annotations

import base64
import html
import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.rundir.paths import EVALUATION
from molmo2_nemo.rundir.progress import StageProgress

SHOWN = 6  # answers of a task
LONGEST = 400  # characters of a text


def section(stages: Sequence[StageProgress]) -> str:
    """The section as HTML; "" where the run has no answers."""
    parts = [part for stage in stages for part in _of_stage(stage)]
    return f"<h2>Answers</h2>{''.join(parts)}" if parts else ""


def _of_stage(stage: StageProgress) -> Iterator[str]:
    folder = _last(stage.folder / EVALUATION)
    for path in sorted(folder.glob("*.jsonl")) if folder else ():
        cards = "".join(_card(line, path.parent) for line in _lines(path))
        if cards:
            title = _text(f"{stage.name}, {path.stem}, {path.parent.name}")
            yield f"<h3>{title}</h3><div class=cards>{cards}</div>"


def _last(folder: Path) -> Path | None:
    """The evaluation of the latest step that has answers."""
    steps = [(int(p.name[5:]), p) for p in folder.glob("step=*") if any(p.glob("*.jsonl")) and p.name[5:].isdecimal()]
    return max(steps)[1] if steps else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The first answers, those with a picture before the others. A damaged line is left out; texts may hold other
    ends of lines (U+2028) than files."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[: 10 * SHOWN]:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and {"question", "answer", "references", "scores"} <= set(line):
            found.append(line)
    return sorted(found, key=lambda line: "picture" not in line)[:SHOWN]


def _card(line: dict[str, Any], folder: Path) -> str:
    picture = folder / Path(str(line.get("picture", ""))).name
    image = ""
    if "picture" in line and picture.is_file():
        image = f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}'>"
    scores = ", ".join(f"{name} {100 * score['value']:.0f} %" for name, score in line["scores"].items())
    said = f"<i>{_text(line['failed'])}</i>" if "failed" in line else _text(line["answer"])
    right = " | ".join(_text(_shown(reference)) for reference in line["references"])
    return (
        f"<div class=card>{image}<p><b>{_text(line['question'])}</b></p><p>{said}</p>"
        f"<p class=note>reference: {right or '-'}<br>{_text(scores or 'not scored')}</p></div>"
    )


def _shown(reference: Any) -> str:
    """A reference in short: of multiple choice, the correct option."""
    if isinstance(reference, dict) and {"option", "options"} <= set(reference):
        letter = str(reference["option"])
        text = dict(zip(string.ascii_uppercase, reference["options"], strict=False)).get(letter, "")
        return str(text) if reference.get("unlabelled") else f"{letter}. {text}"
    return reference if isinstance(reference, str) else json.dumps(reference)


def _text(value: object) -> str:
    text = " ".join(str(value).split())
    return html.escape(text if len(text) <= LONGEST else text[:LONGEST] + " ...")
