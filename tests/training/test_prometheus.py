"""The text file for Prometheus, read back by a strict parser of its format, and by its own where that is installed."""

from __future__ import annotations

import importlib.util
import math
import re

import pytest

from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.training.prometheus import PrometheusFile

LINE = {
    "step": 7, "time": 1764395000.25, "loss": 2.5, "grad_norm_vit": 0.5, "grad_norm_llm": 1.5, "lr_vit": 1e-6,
    "lr_llm": 2e-5,
    "tokens": 9000, "fill": 0.75, "crop_fill": 0.5, "skipped": 3, "skipped_steps": 1, "seconds": 1.5, "wait": 0.25,
    "tokens_per_second": 6000.0, "slowest": {"rank": 1, "host": "n", "data": 0.1}, "lag": 0.125, "tflops": 2.0,
    "memory_gib": 1.5, "tasks": {"a": 2.0, 'b "quoted"\\n\n': None},
}  # fmt: skip
LABELS = {"run": 'my "run"', "stage": "sft"}
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(rf'({NAME})\{{((?:{NAME}="(?:[^"\\\n]|\\["\\n])*",?)*)\}} (\S+)')
LABEL = re.compile(rf'({NAME})="((?:[^"\\\n]|\\["\\n])*)"')
UNITS = ("_seconds", "_bytes", "_ratio", "_total", "_per_second", "loss", "norm", "rate", "step", "max_steps")


def unescaped(match: re.Match) -> str:
    return {"\\\\": "\\", '\\"': '"', "\\n": "\n"}[match[0]]


def parsed(text: str) -> dict[str, tuple[str, dict[tuple, float]]]:
    """Name -> type, and value by labels. Every line must be one of the format's, each name's lines together."""
    found: dict[str, tuple[str, dict[tuple, float]]] = {}
    assert text.endswith("\n") and "\n\n" not in text
    last = None
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            last = line.split(" ", 3)[2]
            assert last not in found and re.fullmatch(NAME, last)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert (
                name == last
                and kind in ("gauge", "counter")
                and kind == ("counter" if name.endswith("_total") else "gauge")
            )
            found[name] = (kind, {})
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None and match[1] == last, line
            labels = tuple((key, re.sub(r"\\.", unescaped, value)) for key, value in LABEL.findall(match[2]))
            assert labels not in found[last][1]
            found[last][1][labels] = float(match[3])
    return found


def test_names_units_and_labels(tmp_path):
    path = tmp_path / "molmo2.prom"
    file = PrometheusFile(path, LABELS)
    file.write({**LINE, "step": 6}, 100)
    file.write(LINE, 100)
    found = parsed(path.read_text())
    usual = tuple(LABELS.items())
    assert all(name.startswith("molmo2_") and name.endswith(UNITS) for name in found)
    assert found["molmo2_step"][1] == {usual: 7.0} and found["molmo2_max_steps"][1] == {usual: 100.0}
    assert found["molmo2_memory_bytes"][1] == {usual: 1.5 * 2**30}
    assert found["molmo2_flops_per_second"][1] == {usual: 2e12}
    assert found["molmo2_last_step_timestamp_seconds"][1] == {usual: LINE["time"]}
    assert found["molmo2_skipped_records_total"] == ("counter", {usual: 3.0})
    assert found["molmo2_learning_rate"][1] == {(*usual, ("group", "vit")): 1e-6, (*usual, ("group", "llm")): 2e-5}
    tasks = found["molmo2_task_loss"][1]
    assert tasks[(*usual, ("task", "a"))] == 2.0 and math.isnan(tasks[(*usual, ("task", 'b "quoted"\\n\n'))])
    assert list(tmp_path.iterdir()) == [path]  # replaced whole: nothing half-written beside it
    file.write({**LINE, "loss": None}, 100)
    assert math.isnan(parsed(path.read_text())["molmo2_loss"][1][usual])


@pytest.mark.skipif(importlib.util.find_spec("prometheus_client") is None, reason="prometheus_client is not installed")
def test_prometheus_reads_the_same(tmp_path):
    from prometheus_client.parser import text_string_to_metric_families

    path = tmp_path / "molmo2.prom"
    PrometheusFile(path, LABELS).write(LINE, 100)
    theirs = {
        sample.name: sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }
    ours = {name: list(samples.values())[-1] for name, (_, samples) in parsed(path.read_text()).items()}
    assert {name: repr(value) for name, value in theirs.items()} == {name: repr(value) for name, value in ours.items()}


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    file = PrometheusFile(tmp_path / "gone" / "a.prom", LABELS)
    file.write(LINE, 9)
    file.write(LINE, 9)
    said = capsys.readouterr().out
    assert said == f"log.prometheus: {tmp_path}/gone/a.prom: No such file or directory; training goes on\n"
    (tmp_path / "gone").mkdir()
    file.write(LINE, 9)
    assert parsed(file.path.read_text()) and capsys.readouterr().out == ""


def test_a_place_for_the_file_is_checked(tmp_path):
    def problems(path):
        cfg = compose(["recipe=tiny", "stage=sft", f"log.prometheus='{path}'", f"output_dir={tmp_path}/run"])
        return [problem for problem in find_problems(cfg) if problem.startswith("log.prometheus")]

    assert problems(f"{tmp_path}/a.prom") == []
    assert problems(f"{tmp_path}/a.txt") == [
        f"log.prometheus={tmp_path}/a.txt: the node exporter reads files that end in .prom only; name one"
    ]
    assert problems(f"{tmp_path}/absent/a.prom") == [
        f"log.prometheus={tmp_path}/absent/a.prom: there is no folder {tmp_path}/absent; "
        "name a file that can be written"
    ]
