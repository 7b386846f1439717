"""What must not depend on the version: a loss curve, a resume under another version, an exported model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.versions.stacks import Installed

STEPS, HALF = 20, 10
LAYOUTS = {"single": ["parallel=single"], "TP2+SP": ["parallel=tp2sp"], "CP2": ["parallel=cp2"]}
PLAIN = "single, no dropout"  # another torch may draw other masks
LAYOUTS[PLAIN] = ["parallel=single", "stage.residual_dropout=0", "stage.response_residual_dropout=0"]
RESUMED = "TP2+SP"  # the layout of the runs that change version: two processes, a sharded optimizer
CURVE = ("loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm")


def train(installed: Installed, layout: str, data: Path, out: Path) -> str | None:
    """`molmo2 train` for STEPS steps, or on to them; what went wrong, if anything did."""
    words = [
        *("train", "recipe=tiny", "stage=sft", f"data.sources.demo.path={data}/sft", f"output_dir={out}"),
        *(f"stage.max_steps={STEPS}", f"save_every={HALF}", "stage.global_batch_size=2", "stage.micro_batch_size=1"),
        *([] if layout == PLAIN else ["stage.residual_dropout=0.1"]),
        *LAYOUTS[layout],
    ]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    code = installed.run("-m", "molmo2_nemo.cli.main", *words, log=log)
    return None if code == 0 else log.read_text().strip().splitlines()[-1]


def curve(out: Path) -> dict[int, list[float]]:
    """Step -> its loss and gradient norms."""
    lines = map(json.loads, (out / "sft" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: [line[name] for name in CURVE] for line in lines}


def compare(first: Path, other: Path) -> float | str:
    """The difference of two runs' curves, or what is missing."""
    if not (first / "sft" / "metrics.jsonl").is_file():
        return "nothing to compare with"
    return difference(curve(first), curve(other))


def difference(one: dict[int, list[float]], other: dict[int, list[float]]) -> float:
    """The largest relative difference of two curves on the steps of the second; 0.0 means equal to the bit."""
    assert set(other) <= set(one) and other
    pairs = [(a, b) for step, values in other.items() for a, b in zip(one[step], values, strict=True)]
    return max(abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0 for a, b in pairs)


def resume(installed: Installed, begun: Path, data: Path, out: Path) -> float | str:
    """Go on from step HALF of a finished run; the difference of the second halves, or what went wrong."""
    if not (begun / "sft" / "checkpoints" / f"step={STEPS}").is_dir():
        return "not begun"
    shutil.copytree(begun, out)
    stage = out / "sft"
    shutil.rmtree(stage / "checkpoints" / f"step={STEPS}")
    (stage / "summary.json").unlink()
    whole = curve(begun)
    if (wrong := train(installed, RESUMED, data, out)) is not None:
        return wrong
    again = {step: values for step, values in curve(out).items() if step > HALF}
    assert len(again) == STEPS - HALF
    return difference(whole, again)


def export(installed: Installed, begun: Path, out: Path) -> bytes | str:
    """The bytes of the weights that this version exports from a finished run, or what went wrong."""
    log = out.with_suffix(".log")
    words: list[Any] = ["-m", "molmo2_nemo.cli.main", "convert", "export", begun / "sft/checkpoints" / f"step={STEPS}"]
    code = installed.run(*map(str, [*words, out]), log=log)
    return (out / "model.safetensors").read_bytes() if code == 0 else log.read_text().strip().splitlines()[-1]
