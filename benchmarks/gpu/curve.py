"""Does the card train like the CPU? 20 steps of the tiny model in bf16, from the same weights and the same shards.

    python -m benchmarks.gpu.curve --work FOLDER [--data FOLDER] [--steps 20] [--out FILE]

bf16 rounds, so no two orders of summation give the same curve. How far apart curves lie by that alone is measured in
the same run: on the CPU the same steps are done in several orders (other kernels of attention, packs grouped into other
micro-batches), all of which add up the same numbers. The distance of two curves is the largest difference of their
losses over the steps, and the noise is the largest distance of two CPU curves.

The card's curve lies within the noise if its median distance to CPU curves is at most TIMES the noise. Where there
is no card, an order that is not among the others (SUBJECT) stands for it: CPU against CPU. A learning rate that is a
quarter higher (CONTROL) makes a curve that must not pass: where it does, the comparison could not have failed, and says
so. Dropout is off, as devices draw other masks.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.report import machine, write_result
from molmo2_nemo.rundir.lines import read_metrics

TIMES = 2.0
PACKS = 4  # of a step
ORDERS = {  # overrides: the same numbers, added up in another order
    "flash": ("model.attention=flash",),
    "blocks": ("model.attention=blocks",),
    "flash, 2 packs at once": ("model.attention=flash", "stage.micro_batch_size=2"),
    "blocks, 4 packs at once": ("model.attention=blocks", "stage.micro_batch_size=4"),
}
SUBJECT = {"CPU, another order": ("model.attention=blocks", "stage.micro_batch_size=2")}
CARD = {"card": ("cluster=gpu",), "card, plain kernels": ("cluster=gpu", "kernels=plain")}
RATE = 2.0e-3  # of the tiny recipe
CONTROL = {"higher rate": tuple(f"stage.optim.{group}.lr={1.25 * RATE}" for group in ("vit", "connector", "llm"))}


def settings(data: Path, steps: int) -> list[str]:
    """Of every curve."""
    return [
        *("recipe=tiny", "stage=pretrain", "parallel=single", f"data.sources.demo.path={data}/pretrain"),
        *("stage.micro_batch_size=1", f"stage.global_batch_size={PACKS}", f"stage.max_steps={steps}"),
        *(
            "stage.residual_dropout=0",
            "stage.response_residual_dropout=0",
            "log.tensorboard=false",
            "data.num_workers=0",
        ),
    ]


def train(overrides: Sequence[str], folder: Path, cpu: bool) -> list[float]:
    """Losses of a run, step by step; a process of its own, with its log in the folder.

    Raises:
        RuntimeError: the run failed.
    """
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "molmo2_nemo.cli.main", "train", *overrides, f"output_dir={folder}"]
    variables = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})}
    with (folder / "log.txt").open("w") as log:
        code = subprocess.run(command, env=variables, stdout=log, stderr=log).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{(folder / 'log.txt').read_text()[-2000:]}")
    return [line["loss"] for line in read_metrics(folder / "pretrain")]


def curves(args: argparse.Namespace, card: bool) -> dict[str, dict[str, list[float]]]:
    """All curves, several at a time, from a checkpoint after one step on the CPU: devices may draw other weights from
    the same seed."""
    first = [*settings(args.data, 1), "save_every=1", "cluster.precision=fp32"]
    train(first, args.work / "start", cpu=True)
    (start,) = (args.work / "start" / "pretrain" / "checkpoints").glob("step=*")
    common = [*settings(args.data, args.steps), "cluster.precision=bf16", f"init_from={start}", "save_every=1000"]
    ways = {"cpu": ORDERS, "control": CONTROL, "subjects": CARD if card else SUBJECT}
    jobs = [(kind, name, more) for kind, named in ways.items() for name, more in named.items()]
    with ThreadPoolExecutor(min(len(jobs), max(2, (os.cpu_count() or 2) // 2))) as pool:
        made = [
            pool.submit(train, [*common, *more], args.work / str(n), kind != "subjects" or not card)
            for n, (kind, _, more) in enumerate(jobs)
        ]
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in ways}
    for (kind, name, _), future in zip(jobs, made, strict=True):
        found[kind][name] = future.result()
        print(f"{name}: {' '.join(f'{loss:.4f}' for loss in found[kind][name])}", flush=True)
    return found


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference at any step."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def verdict(cpu: dict[str, list[float]], subject: list[float]) -> dict[str, Any]:
    """Whether a curve lies within the rounding noise of the CPU's."""
    noise = max(distance(a, b) for a, b in itertools.combinations(cpu.values(), 2))
    found = statistics.median(distance(subject, curve) for curve in cpu.values())
    return {"distance": found, "noise": noise, "allowed": TIMES * noise, "within": found <= TIMES * noise}


def compare(found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Verdicts of every curve that is not one of the CPU's orders.

    Args:
        found: losses by name, of the `cpu`'s orders, the `subjects` and the `control`.
    """
    cpu = found["cpu"]
    verdicts = {name: verdict(cpu, curve) for name, curve in {**found["subjects"], **found["control"]}.items()}
    within = all(verdicts[name]["within"] for name in found["subjects"])
    separates = not any(verdicts[name]["within"] for name in found["control"])
    return {"verdicts": verdicts, "within": within, "separates": separates, "curves": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder for the runs")
    parser.add_argument(
        "--data", type=Path, help="folder with shards in pretrain/; default: made from the demo's images"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.work.exists():
        parser.error(f"--work {args.work} is there already: name a new folder")
    args.work.mkdir(parents=True)
    if args.data is None:
        from data_prep.demo import build_demo

        args.data = args.work / "data"
        build_demo(args.data)
    args.work, args.data = args.work.absolute(), args.data.absolute()
    import torch

    try:
        result = compare(curves(args, torch.cuda.is_available()))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for name, row in result["verdicts"].items():
        print(f"{name}: distance {row['distance']:.2e}, allowed {row['allowed']:.2e}")
    write_result("curve", {"machine": machine(), "steps": args.steps, "times": TIMES} | result, args.out)
    print(f"within rounding noise: {result['within']}; the control is told apart: {result['separates']}")
    return 0 if result["within"] and result["separates"] else 1


if __name__ == "__main__":
    sys.exit(main())
