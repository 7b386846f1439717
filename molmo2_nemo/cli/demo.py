"""The whole recipe on this machine's CPU: shards from real images and a real clip, the three stages of a tiny Molmo2,
export to Hugging Face format, three questions, a table and a plot of the loss curves. If it is interrupted, run it
again: it resumes where it stopped."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from molmo2_nemo.cli.options import check_folder
from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.run import RunConfig

EXAMPLES = """\
examples:
  molmo2 demo
  molmo2 demo --dir /tmp/demo pretrain:stage.max_steps=100
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]KEY=VALUE", help="settings, as for molmo2 pipeline")
    parser.add_argument("--dir", default="demo", type=Path, help="folder for everything it makes (default: demo)")


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.launch.pipeline import compose_stages, run_stages

    start = time.monotonic()
    folder: Path = args.dir
    check_folder("--dir", folder)
    sources = f"data.sources.demo.path='{folder}/data/${{stage.name}}'"
    configs = compose_stages(["recipe=tiny", sources, f"output_dir='{folder}/run'", *args.overrides])
    build_data(folder / "data")
    code = run_stages(configs)
    if code:
        return code
    report(folder, configs, time.monotonic() - start)
    return 0


def build_data(folder: Path) -> None:
    """Makes shards from the images and the clip that come with the package, unless they are there."""
    from molmo2_nemo.data.manifest import MANIFEST
    from molmo2_nemo.settings.compose import STAGES

    if all((folder / name / MANIFEST).is_file() for name in STAGES):
        print(f"shards: found in {folder}")
        return
    from data_prep.demo import build_demo

    counts = build_demo(folder)
    listed = ", ".join(f"{count} records for {name}" for name, count in counts.items())
    print(f"shards: {listed} in {folder}")


def report(folder: Path, configs: list[RunConfig], seconds: float) -> None:
    """Exports the last stage, asks it three things, and shows what happened."""
    from molmo2_nemo.cli.ask import ask
    from molmo2_nemo.cli.convert import export_checkpoint
    from molmo2_nemo.rundir.lines import read_metrics
    from molmo2_nemo.rundir.paths import stage_dir
    from molmo2_nemo.rundir.summary import read_summary

    summaries = [read_summary(stage_dir(cfg)) or {} for cfg in configs]
    checkpoint = Path(summaries[-1]["checkpoint"])
    exported = export_checkpoint(checkpoint, folder / "hf", overwrite=True)
    print(f"exported to Hugging Face format: {exported}")
    media = demo_media()
    print("\nasked after stage 3:")
    for file, question, style in QUESTIONS:
        content = (media / file).read_bytes()
        seen: dict[str, Any] = {"video": content} if file.endswith(".mp4") else {"images": [content]}
        print(f"  {file}: {question}\n    {ask(checkpoint, question, **seen, style=style)}", flush=True)
    print()
    print_table(summaries)
    curves = plot({cfg.stage.name: read_metrics(stage_dir(cfg)) for cfg in configs}, folder / "losses.png")
    print(f"loss curves: {curves}\ntook {int(seconds) // 60} min {int(seconds) % 60} s")


QUESTIONS = (  # file, question, style of the answer
    ("coffee.jpg", "Describe this image.", "long_caption"),
    ("cat.jpg", "Describe this image.", "long_caption"),
    ("bunny.mp4", "Which animal is in the video?", "user_qa"),
)


def demo_media() -> Path:
    """The folder of the images and the clip that the shards were built from."""
    import data_prep

    folder = Path(data_prep.__file__).parent / "demo_media"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; install the package again")
    return folder


def print_table(summaries: list[dict[str, Any]]) -> None:
    """One row per stage, at most 80 columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Molmo2 tiny, three stages")
    table.add_column("stage")
    table.add_column("layout")
    for column in ("steps", "first loss", "last loss", "tokens", "fill"):
        table.add_column(column, justify="right")
    for row in summaries:
        table.add_row(
            str(row["stage"]),
            str(row["layout"]),
            str(row["steps"]),
            f"{row['first_loss']:.3f}",
            f"{row['last_loss']:.3f}",
            f"{row['tokens']:,}",
            f"{row['fill']:.0%}",
        )
    console = Console()
    if console.width > 80 or not console.is_terminal:
        console = Console(width=80)
    console.print(table)


def plot(stages: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """The loss of every step, one curve per stage, written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    offset = 0
    for name, rows in stages.items():
        if not rows:
            continue
        axes.plot([offset + r["step"] for r in rows], [r["loss"] for r in rows], label=name, linewidth=1.6)
        offset += max(r["step"] for r in rows)
        axes.axvline(offset, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlabel("optimizer step, stages one after the other")
    axes.set_ylabel("loss (weighted cross entropy + z-loss)")
    axes.set_title("Molmo2 tiny: pre-training, supervised fine-tuning, long context")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
