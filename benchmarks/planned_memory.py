"""Peak memory of one GPU by the planner, beside what a real step's allocations come to on a virtual GPU.

    python -m benchmarks.planned_memory [RECIPE/STAGE/SCALE ...] [--out FILE]          no GPU; a CUDA build of PyTorch

The trainer runs two steps at full depth and width as rank 0 of the recipe's processes (tests/support/virtual_gpu says
what is simulated): PyTorch's own allocator says what was allocated at most. The planner's figure is without its two
allowances, for the CUDA context and for fragmentation. Packs are those of benchmarks/train_step.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
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

STAGES = ("pretrain", "sft", "long")
RUNS = [f"{model}/{stage}/{scale}" for scale in ("node", "published") for model in ("4b", "8b") for stage in STAGES[1:]]
BIG = 4096  # GiB: nothing ends for want of memory


def measured(model: str, stage: str, scale: str, overrides: list[str]) -> dict[str, Any]:
    """What a step allocates.

    Raises:
        RuntimeError: the run failed; with its last lines.
    """
    cfg = compose([f"recipe={model}", f"stage={stage}", f"scale={scale}", *overrides])
    world = wanted_processes(cfg)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "step.json")
        layers = str(cfg.model.model_config().text.num_layers)
        report = virtual_gpu.run(
            "benchmarks.train_step",
            *("--model", model, "--stages", stage, "--layers", layers, "--micro-batches", "2"),
            *("--steps", "1", "--warmup", "1", "--out", str(out), f"scale={scale}", "parallel=recipe", *overrides),
            gib=BIG,
            world=world,
        )
        if report.returncode:
            raise RuntimeError(f"{model}/{stage}/{scale} failed:\n{report.output[-2000:]}")
        found = json.loads(out.read_text())["stages"][stage]["layers"][layers]
    return {"processes": world, "allocated": found["memory_gib"], "held": report.most_used / GIB}


def planned(model: str, stage: str, scale: str, overrides: list[str]) -> dict[str, float]:
    """The planner's figures in GiB, by part."""
    cfg = compose([f"recipe={model}", f"stage={stage}", f"scale={scale}", *overrides])
    world = wanted_processes(cfg)
    cluster = parse_cluster(f"h100x{min(8, world)}", max(1, world // 8))
    found = configured(cfg, cfg.model.model_config(cfg.stage.lora), workload(cfg), cluster)
    assert found is not None
    parts = {name: value / GIB for name, value in found.memory.parts().items() if name != "runtime"}
    return parts | {"total": sum(parts.values()), "phase": found.memory.phase}  # type: ignore[dict-item]


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Peak memory of one GPU, GiB", caption="planned: without the allowances for context and slack")
    for name in ("run", "GPUs", "planned", "allocated", "error", "held"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        figures = (f"{row['planned']['total']:.1f}", f"{row['allocated']:.1f}", f"{row['error']:+.0%}")
        table.add_row(row["run"], str(row["processes"]), *figures, f"{row['held']:.1f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RECIPE/STAGE/SCALE", help=f"default: {' '.join(RUNS)}")
    parser.add_argument("--out", type=Path)
    args, overrides = parser.parse_known_args()
    if (problem := virtual_gpu.problem()) is not None:
        parser.error(problem)
    rows = []
    for run in args.runs or RUNS:
        model, stage, scale = run.split("/")
        plan, found = planned(model, stage, scale, overrides), measured(model, stage, scale, overrides)
        rows.append({"run": run, "planned": plan, **found, "error": plan["total"] / found["allocated"] - 1})
        print(json.dumps(rows[-1]), flush=True)
    show(rows)
    write_result("planned_memory", {"machine": machine(), "overrides": overrides, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
