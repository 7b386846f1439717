"""The last step's figures as a text file for Prometheus' node exporter (its textfile collector), replaced whole.

Units are Prometheus' own: seconds, bytes, ratios of 1. docs/running.md has the names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import file_error
from molmo2_nemo.files import write_text
from molmo2_nemo.settings.run import BESIDE_ADAPTERS, OPTIMIZER_GROUPS

PREFIX = "molmo2_"


@dataclass(frozen=True)
class Family:
    """One metric: the key of a line of metrics.jsonl, and what it is here."""

    key: str
    name: str
    words: str
    factor: float = 1.0
    kind: str = "gauge"


FAMILIES = (
    Family("step", "step", "Optimizer steps done."),
    Family("time", "last_step_timestamp_seconds", "When the last step ended, in seconds since 1970."),
    Family("loss", "loss", "Loss of the global batch; NaN for a step that was not finite."),
    Family("seconds", "step_seconds", "Length of the step."),
    Family("wait", "data_wait_seconds", "How long the slowest rank waited for data."),
    Family("lag", "lag_seconds", "How much longer the slowest rank took by itself than the others."),
    Family("tokens_per_second", "tokens_per_second", "Tokens of all replicas, without padding."),
    Family("tflops", "flops_per_second", "Floating-point operations of one process, by mask area.", 1e12),
    Family("mfu", "mfu_ratio", "Model FLOPs utilisation."),
    Family("fill", "fill_ratio", "Share of the tokens of packs that is not padding."),
    Family("crop_fill", "crop_fill_ratio", "Share of the crop budget that is used."),
    Family("memory_gib", "memory_bytes", "Peak of the process that held most.", 2**30),
    Family("pinned_gib", "pinned_bytes", "Pinned host memory of the process that pinned most.", 2**30),
    Family("skipped", "skipped_records_total", "Records that could not be used since the run began.", kind="counter"),
    Family("skipped_steps", "skipped_steps_total", "Steps that were not taken since the run began.", kind="counter"),
)
GROUPED = (  # keys end in the group's name
    Family("grad_norm_", "grad_norm", "Gradient norm of an optimizer group before clipping."),
    Family("lr_", "learning_rate", "Learning rate of an optimizer group."),
)
TASK_LOSS = Family("tasks", "task_loss", "Loss of a group of the mixture.")


class PrometheusFile:
    """Writes the file; on one rank.

    Args:
        labels: of every sample.
    """

    def __init__(self, path: Path, labels: Mapping[str, str]) -> None:
        self.path, self.labels = path, dict(labels)
        self._failed = False

    def write(self, line: Mapping[str, Any], last_step: int) -> None:
        """Replace the file by the figures of a line of metrics.jsonl. A file that cannot be written is said once, and
        again after it could be; training does not stop for it."""
        try:
            write_text(self.path, text(line, last_step, self.labels))
        except OSError as error:
            if not self._failed:
                print(f"log.prometheus: {file_error(error)}; training goes on", flush=True)
            self._failed = True
        else:
            self._failed = False


def text(line: Mapping[str, Any], last_step: int, labels: Mapping[str, str]) -> str:
    """The file's text, in Prometheus' exposition format 0.0.4."""
    written = []
    for family, samples in families({**line, "max_steps": last_step}):
        name = PREFIX + family.name
        written += [f"# HELP {name} {family.words}", f"# TYPE {name} {family.kind}"]
        for extra, value in samples:
            shown = ",".join(f'{key}="{_escaped(word)}"' for key, word in {**labels, **extra}.items())
            written.append(f"{name}{{{shown}}} {_number(value, family.factor)}")
    return "\n".join(written) + "\n"


def families(line: Mapping[str, Any]) -> Iterator[tuple[Family, list[tuple[dict[str, str], Any]]]]:
    """Each metric that the line has, with its samples: further labels, and the value."""
    for family in (*FAMILIES, Family("max_steps", "max_steps", "Steps that the stage is to have.")):
        if family.key in line:
            yield family, [({}, line[family.key])]
    for family in GROUPED:
        names = [group for group in (*OPTIMIZER_GROUPS, BESIDE_ADAPTERS) if family.key + group in line]
        if names:
            yield family, [({"group": group}, line[family.key + group]) for group in names]
    if line.get("tasks"):
        yield TASK_LOSS, [({"task": task}, value) for task, value in sorted(line["tasks"].items())]


def _number(value: Any, factor: float) -> str:
    found = math.nan if value is None else value * factor
    return "NaN" if math.isnan(found) else repr(found)


def _escaped(word: str) -> str:
    return word.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
