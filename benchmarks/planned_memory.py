"""Peak memory of one GPU by the planner, beside what a real step's allocations come to on a virtual GPU.

    python -m benchmarks.planned_memory [RECIPE/SCALE ...] [--out FILE]          no GPU; a CUDA build of PyTorch

The trainer runs two steps at full depth and width as rank 0 of the recipe's processes (tests/support/virtual_gpu says
what is simulated): PyTorch's own allocator says what was allocated at most. The planner's figure is without its two
allowances, for the CUDA context and for fragmentation. Packs are those of benchmarks/train_step.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import machine, write_result
from molmo2_nemo.cost.hardware import parse_cluster
from molmo2_nemo.cost.workload import workload
from molmo2_nemo.plan.memory import GIB
from molmo2_nemo.plan.search import configured
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.sizes import wanted_processes
from tests.support import virtual_gpu

STAGES = ("sft", "long")
RUNS = ("4b/node", "4b/published")  # no tensor parallelism: imagined ranks do not say who they are
BIG = 4096  # GiB: nothing ends for want of memory


def measured(
    model: str, scale: str, overrides: Sequence[str], *, find_waits: bool = False
) -> tuple[virtual_gpu.Report, dict[str, dict[str, Any]]]:
    """What the steps of each stage allocate, in GiB.

    Raises:
        RuntimeError: the run failed; with its last lines.
    """
    cfg = compose([f"recipe={model}", "stage=long", f"scale={scale}", *overrides])
    layers = str(cfg.model.model_config().text.num_layers)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "steps.json")
        report = virtual_gpu.run(
            "benchmarks.train_step",
            *("--model", model, "--stages", *STAGES, "--layers", layers, "--micro-batches", "2"),
            *("--steps", "1", "--warmup", "1", "--out", str(out), f"scale={scale}", "parallel=recipe", *overrides),
            gib=BIG,
            world=wanted_processes(cfg),
            find_waits=find_waits,
        )
        if report.returncode:
            raise RuntimeError(f"{model}/{scale} failed:\n{report.output[-2000:]}")
        found = json.loads(out.read_text())["stages"]
    return report, {stage: found[stage]["layers"][layers] for stage in STAGES}


def planned(model: str, scale: str, stage: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The planner's figures in GiB, by part, and the phase of a step that they are of."""
    cfg = compose([f"recipe={model}", f"stage={stage}", f"scale={scale}", *overrides])
    world = wanted_processes(cfg)
    cluster = parse_cluster(f"h100x{min(8, world)}", max(1, world // 8))
    found = configured(cfg, cfg.model.model_config(cfg.stage.lora), workload(cfg), cluster)
    assert found is not None
    parts = {name: value / GIB for name, value in found.memory.parts().items() if name != "runtime"}
    return parts | {"total": found.memory.counted / GIB, "phase": found.memory.phase, "processes": world}


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Peak memory of one GPU, GiB", caption="planned: without the allowances for context and slack")
    for name in ("run", "GPUs", "planned", "allocated", "error"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        figures = (f"{row['planned']['total']:.1f}", f"{row['allocated']:.1f}", f"{row['error']:+.0%}")
        table.add_row(row["run"], str(row["planned"]["processes"]), *figures)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RECIPE/SCALE", help=f"default: {' '.join(RUNS)}")
    parser.add_argument("--out", type=Path)
    args, overrides = parser.parse_known_args()
    if (problem := virtual_gpu.problem()) is not None:
        parser.error(problem)
    rows = []
    overrides += [run for run in args.runs if "=" in run]
    for run in [run for run in args.runs if "=" not in run] or RUNS:
        model, scale = run.split("/")
        _, found = measured(model, scale, overrides)
        for stage, step in found.items():
            plan = planned(model, scale, stage, overrides)
            rows.append({"run": f"{model}/{stage}/{scale}", "planned": plan, "allocated": step["memory_gib"]})
            rows[-1]["error"] = plan["total"] / step["memory_gib"] - 1
            print(json.dumps(rows[-1]), flush=True)
    show(rows)
    write_result("planned_memory", {"machine": machine(), "overrides": overrides, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
