"""What a run says of its data when it ends: two replicas and one, stopped in the middle and resumed."""

from __future__ import annotations

import contextlib
import io
import json
from importlib import metadata
from typing import Any

import pytest

from molmo2_nemo.data.config import SourceConfig
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tally import Tally
from tests.support.packs import demo_data, tiny_run
from tests.support.source_rows import png

QA = {"style": "user_qa", "question": "What is it?", "answer": "a cat"}


def record(pictures: int, answer: str = "a cat") -> dict[str, bytes]:
    names = [f"{i}.png" for i in range(pictures)]
    data = {"images": names, "annotations": [{**QA, "answer": answer}]}
    return {"json": json.dumps(data).encode(), **{name: png(40, 30) for name in names}}


def ended(cfg: Any) -> tuple[str, list[Any]]:
    """Train to the end: what was printed, and the loader's states."""
    from molmo2_nemo.nemo.train import train
    from molmo2_nemo.training.data import TrainingData

    states: list[Any] = []
    totals, said = TrainingData.totals, io.StringIO()

    def kept(self: Any) -> Tally:
        states[:] = self._states()
        return totals(self)

    TrainingData.totals = kept  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(said):
            train(cfg)
    finally:
        TrainingData.totals = totals  # type: ignore[method-assign]
    return said.getvalue(), states


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_says_what_it_left_out(workers, tmp_path, ranks):
    write_shards(tmp_path / "six", [(f"p{i}", record(6 if i % 2 else 2)) for i in range(9)])
    write_shards(tmp_path / "blank", [(f"b{i}", record(1, " " if i == 4 else "x")) for i in range(9)])
    cfg = tiny_run(tmp_path / "run", 4)
    cfg.data = demo_data(tmp_path)
    cfg.data.sources = {name: SourceConfig(path=str(tmp_path / name)) for name in ("six", "blank")}
    cfg.data.image.max_multi_image_crops = 1
    cfg.log.tensorboard = False
    cfg.stage.max_steps = 2
    workers.run(ended, cfg, ranks=ranks, fit=True)
    cfg.stage.max_steps = 4
    said, states = workers.run(ended, cfg, ranks=ranks, fit=True)[0]
    summary = json.loads((tmp_path / "run" / "sft" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert len(states) == ranks
    merged = Tally()
    for state in states:
        merged.update(Tally.of_state(state))
    assert summary["by_source"] == json.loads(json.dumps(merged.summary()))
    six, blank = summary["by_source"]["six"], summary["by_source"]["blank"]
    assert set(six["ignored"]) == {"count", "first"} and six["ignored"]["first"].startswith("six-000000.tar:p")
    assert six["ignored"]["count"] < six["examples"]["count"]
    assert blank["skipped: bad annotation"]["first"] == "blank-000000.tar:b4" and "ignored" not in blank
    assert summary["counts"]["examples"] == six["examples"]["count"] + blank["examples"]["count"]
    assert summary["counts"]["ignored"] == six["ignored"]["count"]
    assert summary["skipped"]["bad annotation"] == blank["skipped: bad annotation"]["count"]
    datasets = {name: ShardDataset(tmp_path / name, name) for name in ("six", "blank")}
    expected = {name: [data.fingerprint, 9, pytest.approx(0.5)] for name, data in datasets.items()}
    assert summary["data"] == {"seed": cfg.data.seed, "sources": expected}
    attempt = json.loads((tmp_path / "run" / "sft" / "attempt.json").read_text())
    assert attempt["code"]["versions"]["torch"] == metadata.version("torch")
    assert "sft: what was skipped, left out or replaced, by data set:" in said
    assert f"{six['ignored']['count']:>10,} images after the first 5, left out (data.image.max_images=5)" in said
    assert f"{six['ignored']['count']:>18,} six, first {six['ignored']['first']}" in said
