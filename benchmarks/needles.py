"""What recipe=needle learns: accuracy by depth and length of the haystack, inside and past the training length.

    python -m benchmarks.needles [--run DIR] [--frames 16,64,128,224] [--depths 10] [--out benchmarks/results/NAME.json]

Makes the films, trains the three stages (half an hour on two cores) and evaluates the last one; with
--run, evaluates the recipe's run in that folder. Beside the result there is a picture of the same name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import machine, write_result
from data_prep.needles import SETS, build_sets

MOLMO2 = (sys.executable, "-m", "molmo2_nemo.cli.main")


def trained(folder: Path, share: float = 1.0) -> Path:
    """The folder of a run of the recipe on films of its own.

    Args:
        share: of the films, and of the steps.
    """
    from molmo2_nemo.settings.compose import compose

    build_sets(folder / "data", share)
    steps = {name: compose(["recipe=needle", f"stage={name}"]).stage.max_steps for name in SETS}
    fewer = [f"{name}:stage.max_steps={max(2, round(count * share))}" for name, count in steps.items() if share != 1]
    environment = {**os.environ, "MOLMO2_NEEDLE_DATA": str(folder / "data")}
    subprocess.run(
        [*MOLMO2, "pipeline", "recipe=needle", f"output_dir={folder / 'run'}", *fewer], env=environment, check=True
    )
    return folder / "run"


def stages(run: Path) -> dict[str, Any]:
    """Steps and seconds of training of each stage, from its log."""
    found = {}
    for name in SETS:
        lines = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = {
            "steps": lines[-1]["step"],
            "seconds": round(sum(line["seconds"] for line in lines)),
            "last_loss": round(lines[-1]["loss"], 4),
        }
    return found


def evaluated(stage: Path, frames: str, depths: int, out: Path) -> dict[str, Any]:
    """Heat maps of a stage's last checkpoint, and its accuracy by kind of question at each length."""
    words = ["evaluate", str(stage), "--tasks", "needle", "--frames", frames, "--depths", str(depths)]
    subprocess.run([*MOLMO2, *words, "--out", str(out)], check=True)
    kinds = {}
    for length in frames.split(","):
        result = json.loads((out / f"needle@{length}.json").read_text())
        by = result["scores"]["exact_match"]["by"]
        kinds[length] = {name: round(found["score"], 4) for name, found in (by["kind"] | by["needle"]).items()}
    return {"maps": json.loads((out / "needle_map.json").read_text())["maps"], "by_kind": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--frames", default="16,64,128,224")
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from molmo2_nemo.evaluation.needles.heat_map import draw

    longest = max(SETS["long"].frames)
    with tempfile.TemporaryDirectory(prefix="needles-") as work:
        run = args.run or trained(Path(work))
        start = time.monotonic()
        found = evaluated(run / "long", args.frames, args.depths, Path(work) / "evaluation")
        result = {
            "machine": machine(),
            "training": stages(run),
            "training_frames": longest,
            "evaluation_seconds": round(time.monotonic() - start),
            **found,
        }
    path = write_result("needles", result, args.out)
    title = f"recipe=needle, exact match; trained on up to {longest} frames"
    print(draw(found["maps"], Path(path).with_suffix(".png"), title=title, trained=longest))


if __name__ == "__main__":
    main()
