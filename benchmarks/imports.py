"""What importing costs before a run begins, in processor seconds, each way in new processes and in turns.

    python -m benchmarks.imports [--repeats 5] [--out FILE]

    lightning   NeMo's trainer alone (nemo.lightning), as it is
    nemo        nemo.collections.llm, with whose `train` NeMo's own commands start a run
    ours        what a run's process imports: NeMo's trainer without modelopt, and all that is ours (molmo2_nemo.nemo)

Medians, and the ratios to `nemo`. One thread, no GPU asked for.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.report import machine, write_result

WAYS = {
    "lightning": "import nemo.lightning",
    "nemo": "from nemo.collections import llm",
    "ours": "from molmo2_nemo.nemo.start import start_nemo; start_nemo(); import molmo2_nemo.nemo.recipes",
}
SAYS = "; import time; print('seconds', time.process_time())"


def seconds(way: str) -> float:
    """Processor time of a process that imports one way."""
    alone = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", WAYS[way] + SAYS], capture_output=True, text=True, env=alone)
    words = next((line.split() for line in done.stdout.splitlines() if line.startswith("seconds ")), None)
    if done.returncode or words is None:
        raise SystemExit(f"{WAYS[way]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return round(float(words[1]), 2)


def main(words: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    runs: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way, found in runs.items():
            found.append(seconds(way))
    medians = {way: statistics.median(found) for way, found in runs.items()}
    ratios = {way: round(median / medians["nemo"], 2) for way, median in medians.items()}
    for way in WAYS:
        print(f"{way:<10} {medians[way]:6.2f} s   {ratios[way]:5.2f} of nemo   {runs[way]}")
    write_result("imports", {"machine": machine(), "seconds": runs, "ratios": ratios}, args.out)
    return runs


if __name__ == "__main__":
    main()
