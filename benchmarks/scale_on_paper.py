"""Plans at sizes that papers claim, and dynamic groups on recorded packs: predictions with what they assume.

    python -m benchmarks.scale_on_paper [--out benchmarks/results/scale_on_paper-DATE.json]

Every row is a `molmo2 plan` that a user can type, its best layout, and the remarks that the command makes. Nothing here
was measured on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

from benchmarks.report import machine, write_result
from molmo2_nemo.cli.main import main as molmo2

PACKS = Path(__file__).parent / "results" / "packs_demo_sft-2026-11-21.jsonl"


def long(tokens: int, crops: int, factor: int) -> list[str]:
    """Settings of packs of so many tokens: a film of so many frames, causal but for its frames (half of S x S)."""
    return [
        *("recipe=8b", "stage=long", "stage.global_batch_size=8", f"data.packing.sequence_length={tokens}"),
        *(f"data.packing.max_crops={crops}", f"data.video.max_frames={crops}", "memory.vision_chunk=16"),
        *("model.rope_scaling=yarn", f"model.rope_factor={factor}", "--area", "0.5"),
    ]


PLANS = {
    "2M tokens, 256 H100 (LongVILA's claim)": [*long(2**21, 24576, 57), "cluster=h100x8", "nodes=32"],
    "1M tokens, 8 H100": [*long(2**20, 12288, 29), "cluster=h100x8"],
    "1M tokens, 8 H200": [*long(2**20, 12288, 29), "cluster=h200x8"],
    "stage 3 as published, 1,024 H100": ["recipe=8b", "stage=long", "cluster=h100x8", "nodes=128"],
    "stage 2, recorded packs, 64 H100": ["recipe=8b", "stage=sft", "cluster=h100x8", "nodes=8", "--packs", str(PACKS)],
    "stage 2, recorded packs, 256 H100": [
        "recipe=8b",
        "stage=sft",
        "cluster=h100x8",
        "nodes=32",
        "--packs",
        str(PACKS),
    ],
}


def planned(name: str, words: list[str]) -> dict:
    """One plan: its command, its best layout and what was assumed, or why there is none."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = molmo2(["plan", *words, "--json"])
    row = {"name": name, "command": " ".join(["molmo2 plan", *words]).replace(f"{PACKS.parent}/", "")}
    if code:
        return row | {"refused": err.getvalue().strip()}
    found = json.loads(out.getvalue())
    best = found["best"][0]
    row |= {key: best[key] for key in ("layout", "settings", "seconds", "mfu", "gpu_hours", "network_bytes")}
    row |= {
        "gib": sum(best["memory_gib"].values()),
        "host_gib": best["host_gib"],
        "flops_per_step": found["flops_per_step"],
    }
    row |= {"stage_days": best["seconds"] * found["steps"] / 86400, "kernel": found["kernel"]}
    remarks = [text.replace(f"{PACKS.parent}/", "") for text in found["remarks"]]
    return row | {"assumed": remarks, "rates": found["rates"], "groups": found.get("groups")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale_on_paper", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/scale_on_paper-<date>.json")
    args = parser.parse_args(argv)
    results = []
    for name, words in PLANS.items():
        row = planned(name, words)
        results.append(row)
        if "refused" in row:
            print(f"{name}: {row['refused']}", flush=True)
            continue
        print(
            f"{name}: {row['layout']}, {row['gib']:.0f} GiB, {row['seconds']:,.1f} s/step, MFU {row['mfu']:.0%}, "
            f"{row['gpu_hours']:,.0f} GPU-hours, {row['stage_days']:.1f} days",
            flush=True,
        )
        for size, seconds in (row["groups"] or {}).get("seconds", {}).items():
            print(f"    {size}: {seconds:.3g} s", flush=True)
    write_result("scale_on_paper", {"machine": machine(), "settings": {}, "results": results}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
