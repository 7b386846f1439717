"""benchmarks/train_step.py on two processes: the same command as on GPUs, with the tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.train_step import TINY, at_depth, main, settings
from molmo2_nemo.cost.flops import training_flops
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import preset
from tests.support.batches import Shapes, batch, batch_flops


def bench_job(out) -> dict:
    shape = ["--stages", "long", "--layers", "1", "2", "--steps", "1", "--warmup", "1", "--micro-batches", "1"]
    return main(["--tiny", *shape, "--out", str(out), "parallel.context=2", "log.peak_tflops=2"])


def test_counts_time_and_extrapolates(workers, tmp_path):
    found, nothing = workers.run(bench_job, tmp_path / "r.json", ranks=2, fit=True)
    assert nothing == {}  # rank 0 speaks for all
    stage = found["stages"]["long"]
    assert stage["processes"] == 2 and stage["layout"]["context"] == 2
    rows = stage["layers"]
    assert {n: row["measured"] for n, row in rows.items()} == {1: True, 2: True, 4: False}
    length, _ = TINY["long"]
    model = preset("tiny")
    pack = batch([Shapes(model).videos(length, length)], length, model)
    work = training_flops(batch_flops(model, pack)).total / 1e12
    assert rows[4]["tflop"] == pytest.approx(work / 2, rel=1e-6)  # of each process, at the full depth
    assert rows[4]["seconds"] == pytest.approx(3 * rows[2]["seconds"] - 2 * rows[1]["seconds"])
    for row in rows.values():
        assert row["mfu"] == pytest.approx(row["tflop"] / row["seconds"] / 2)
    assert rows[2]["loss"] == pytest.approx(np.log(model.text.vocab_size), rel=0.2)
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["machine"]["cores"] and kept["stages"]["long"]["tokens"] == length


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="3 processes: expected a multiple of tensor \\* context \\* pipeline = 2"):
        settings("tiny", "sft", 3, ["parallel.context=2"], 1)
    with pytest.raises(UserError, match="--layers needs two numbers to extrapolate to 36 layers"):
        at_depth({4: {"seconds": 1.0}}, 36)


@pytest.mark.parametrize(("model", "stage", "size"), [("4b", "sft", (16384, 128)), ("8b", "long", (36864, 384))])
def test_published_shapes(model, stage, size):
    cfg = settings(model, stage, 8, [], 2)
    assert (cfg.data.packing.sequence_length, cfg.data.packing.max_crops) == size
    assert (cfg.parallel.context, cfg.parallel.data, cfg.stage.global_batch_size) == (8, 1, 2)
    assert cfg.cluster.precision == "bf16"
