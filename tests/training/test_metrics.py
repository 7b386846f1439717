"""One more figure is one more file: it reaches metrics.jsonl and the loggers without a word elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.packs import demo_packs, tiny_run, train_on_packs

MADE = '''
from molmo2_nemo.training.metrics.interface import Metric


class Records(Metric):
    """How many there were, and the most on one rank."""

    def summed(self, step):
        return [len(step.result.statistics.keys)]

    def largest(self, step):
        return [float(len(step.result.statistics.keys))]

    def figures(self, step, summed, largest):
        return {"records": int(summed[0]), "most_records": largest[0]}
'''
LINE = (
    *("step", "time", "loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm", "lr_vit", "lr_connector"),
    *("lr_llm", "tokens", "padded_tokens", "crops", "fill", "crop_fill", "skipped", "skipped_steps", "seconds"),
    *("wait", "tokens_per_second", "slowest", "lag", "tflops", "memory_gib", "tasks", "mfu"),
)


def made_job(cfg: Any, packs: Any, folder: str) -> dict[str, Any]:
    """Train with a metric from a file in `folder`; TensorBoard's last value of every scalar, on rank 0."""
    from molmo2_nemo.training import metrics

    metrics.__path__.append(folder)
    try:
        train_on_packs(cfg, packs)
    finally:
        metrics.__path__.remove(folder)
        sys.modules.pop("molmo2_nemo.training.metrics.made", None)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(cfg.output_dir) / "sft" / "tb"))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def test_a_made_metric_is_one_file(workers, tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "made.py").write_text(MADE)
    cfg = tiny_run(tmp_path / "run", 1, data=2)
    cfg.log.peak_tflops = 0.05
    packs = demo_packs(4)
    scalars = workers.run(made_job, cfg, packs, str(tmp_path / "metrics"), ranks=2, fit=True)[0]
    (line,) = map(json.loads, (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines())
    counts = [sum(len(keys) for keys in pack.keys) for pack in packs]
    assert line["records"] == sum(counts)
    assert max(counts) < line["most_records"] < sum(counts)
    assert tuple(line)[: len(LINE)] == LINE and {"records", "most_records"} <= set(tuple(line)[len(LINE) :])
    for name, value in line.items():
        if name not in ("step", "time", "tasks", "slowest"):
            assert abs(scalars[name] - value) <= 1e-6 * abs(value), name
