"""Questions of published benchmarks against the released loaders and formatter, replayed from official/prompts.py."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.task import TaskSettings
from molmo2_nemo.evaluation.tasks import find_task

FILE = Path(__file__).parent / "official" / "prompts.json.gz"
CASES: dict[str, Any] = json.loads(gzip.decompress(FILE.read_bytes()))


@pytest.fixture(scope="module")
def builder() -> ExampleBuilder:
    return ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"), training=False)


def filled(value: Any) -> Any:
    """Rows with a picture in the place of each number of one."""
    if isinstance(value, dict) and set(value) == {"picture"}:
        out = io.BytesIO()
        Image.new("RGB", (8 + value["picture"], 6)).save(out, "PNG")
        return {"bytes": out.getvalue(), "path": "a.png"}
    if isinstance(value, dict):
        return {name: filled(part) for name, part in value.items()}
    return [filled(part) for part in value] if isinstance(value, list) else value


def put(root: Path, files: dict[str, Any]) -> None:
    for name, rows in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(filled(rows)), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text(json.dumps(rows))


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_benchmark_is_asked_as_released(name, tmp_path, builder):
    put(tmp_path, CASES[name]["files"])
    items = find_task(name).open(TaskSettings(tmp_path))
    asked = [question for number in range(len(items)) for question in items.questions(number, builder)]
    assert len(asked) == len(CASES[name]["asked"]) >= 50
    rng = np.random.default_rng(0)
    for question, (text, pictures, clip, subtitles) in zip(asked, CASES[name]["asked"], strict=True):
        prompt = question.prompt
        assert builder.formatter.question(prompt.question, prompt.style, rng) == text
        assert len(prompt.images) == pictures and (None if prompt.clip is None else list(prompt.clip)) == clip
        heard = {(start, end): said for start, end, said in prompt.subtitles}  # released: the last one of a time
        assert heard == {(start, end): said for start, end, said in subtitles}
        for scorer in question.scorers or find_task(name).scorers:
            find_scorer(scorer).check(question.references)
