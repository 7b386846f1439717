"""Makes moment_retrieval.json.gz: random answers, and what the published functions say of them.

    python moment_retrieval.py MOLMO2 MOMENT_DETR

MOLMO2 is a checkout of github.com/allenai/molmo2, MOMENT_DETR one of github.com/jayleicn/moment_detr (the evaluation of
QVHighlights). Their functions are taken out of their files, so that nothing but numpy needs to be installed.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
CASES = 800
UTILS = (
    "compute_temporal_iou_batch_cross",
    "compute_temporal_iou_batch_paired",
    "interpolated_precision_recall",
    "compute_average_precision_detection",
)
EVAL = ("compute_average_precision_detection_wrapper", "compute_mr_ap", "compute_mr_r1")


def definitions(path: Path, names: tuple[str, ...], scope: dict[str, Any] | None = None) -> dict[str, Any]:
    """The classes and functions of a file, without its imports, beside what `scope` has."""
    kept = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names]
    scope = scope or {"np": np, "re": re, "defaultdict": defaultdict, "Evaluator": object}
    exec(compile(ast.Module(body=kept, type_ignores=[]), str(path), "exec"), scope)
    return scope


def windows(rng: random.Random, most: int) -> list[list[float]]:
    """Up to `most` windows that do not overlap, most of them on a grid of two seconds, as published."""
    step = rng.choice([2, 2, 2, 0.5])
    ends = sorted(rng.sample(range(round(150 / step)), 2 * rng.randint(1, most)))
    return [[a * step, b * step] for a, b in zip(ends[::2], ends[1::2], strict=True)]


def answered(rng: random.Random, near: list[list[float]]) -> list[list[float]]:
    """Segments near the windows, some exact, some far, in any order; some end before they begin."""
    found = [[a + rng.choice([0, 0, 2, -2, 5.5]), b + rng.choice([0, 0, 1, -4, 7])] for a, b in near]
    found += windows(rng, 3) if rng.random() < 0.5 else []
    found = [[max(a, 0), max(b, 0)] for a, b in found if rng.random() < 0.9]
    rng.shuffle(found)
    return found * rng.choice([1, 1, 1, 1, 3])


def written(rng: random.Random, found: list[list[float]]) -> str:
    form = rng.choice(["[{}-{}]", "[{}-{}]", "({} - {})", "{}-{}", "from {}- {} s"])
    return rng.choice(["Segments: ", "", "1. "]) + ", ".join(form.format(a, b) for a, b in found)


def main(molmo2: Path, moment_detr: Path) -> None:
    evaluator = definitions(molmo2 / "olmo/eval/evaluators.py", ("QVHighlightsEval",))["QVHighlightsEval"]()
    scope = definitions(moment_detr / "standalone_eval/utils.py", UTILS)
    definitions(moment_detr / "standalone_eval/eval.py", EVAL, scope)
    rng, cases = random.Random(0), []
    for number in range(CASES):
        truth = windows(rng, 5)
        answer = written(rng, answered(rng, truth))
        found = evaluator.parse_segments(answer)
        precision, recall, f1 = evaluator.compute_metrics(found, truth)
        case = {"answer": answer, "windows": truth, "segments": found}
        case |= {"precision": precision, "recall": recall, "f1": f1}
        if found:
            ranked = [[a, b, -i] for i, (a, b) in enumerate(found)]
            asked = [{"qid": number, "pred_relevant_windows": ranked}], [{"qid": number, "relevant_windows": truth}]
            case["r1"] = scope["compute_mr_r1"](*asked, iou_thds=[0.3, 0.5, 0.7])
            case["ap"] = scope["compute_mr_ap"](*asked, num_workers=1)
        cases.append(case)
    text = json.dumps(cases, separators=(",", ":"))
    with gzip.GzipFile(HERE / "moment_retrieval.json.gz", "wb", mtime=0) as file:
        file.write(text.encode())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
