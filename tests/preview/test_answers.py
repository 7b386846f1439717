"""Answers in a run's report, whatever characters they hold."""

from __future__ import annotations

import html
from pathlib import Path

from molmo2_nemo.evaluation.results import result_of, write_result
from molmo2_nemo.preview.answers import section
from molmo2_nemo.rundir.progress import StageProgress

TEXTS = [
    "two\u2028lines",
    "next\u0085line",
    "a\x0bb\x1cc",
    "<b>bold</b> & more",
    "\ud7ff\U0001f408",
    "tab\tand\r\nreturn",
]


def test_every_answer_is_shown(tmp_path: Path) -> None:
    lines = [
        {"item": n, "place": 0, "key": f"r{n}", "tags": {}, "question": f"Q{n}?", "answer": text, "references": [text]}
        | {"scores": {"anls": {"value": 1.0}}, "remarks": []}
        for n, text in enumerate(TEXTS)
    ]
    write_result(tmp_path / "evaluation" / "step=2", result_of("held", "own data", lines, {}), lines)
    page = section([StageProgress("sft", tmp_path)])
    for number, text in enumerate(TEXTS):
        shown = html.escape(" ".join(text.split()))
        assert f"<b>Q{number}?</b></p><p>{shown}</p>" in page and f"reference: {shown}<br>" in page
