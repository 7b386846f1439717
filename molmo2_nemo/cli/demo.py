"""The whole recipe on this machine's CPU: shards from real images and a real clip, the three stages of a tiny Molmo2,
export to Hugging Face format, three questions, scores of each stage on its own shards, a plot of the loss curves. If it
is interrupted, run it again: it resumes where it stopped."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

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
    scored = ["evaluation.tasks=[auto]", f"evaluation.data='{folder}/data/sft'", "evaluation.every=1000000"]
    configs = compose_stages(["recipe=tiny", sources, *scored, f"output_dir='{folder}/run'", *args.overrides])
    build_data(folder / "data")
    code = run_stages(configs)
    if code:
        return code
    report(folder, configs, time.monotonic() - start)
    return 0


def build_data(folder: Path) -> None:
    """Makes shards from the images and the clip that come with the package, unless they are there."""
    from data_prep.demo import SETS, build_demo
    from molmo2_nemo.data.manifest import MANIFEST

    if all((folder / name / MANIFEST).is_file() for name in SETS):
        print(f"shards: found in {folder}")
        return
    counts = build_demo(folder)
    listed = ", ".join(f"{count} records for {name}" for name, count in counts.items())
    print(f"shards: {listed} in {folder}")


def report(folder: Path, configs: list[RunConfig], seconds: float) -> None:
    """Exports the last stage, asks it three things, and shows what happened."""
    from molmo2_nemo.processes import quiet

    quiet()
    from molmo2_nemo.convert import export_checkpoint
    from molmo2_nemo.inference.generate import answer
    from molmo2_nemo.inference.prompt import Prompt
    from molmo2_nemo.launch.pipeline import scores_of_stages
    from molmo2_nemo.preview.finished import plot_losses, print_table
    from molmo2_nemo.rundir.lines import read_metrics
    from molmo2_nemo.rundir.paths import stage_dir
    from molmo2_nemo.rundir.summary import read_summary

    summaries = [read_summary(stage_dir(cfg)) or {} for cfg in configs]
    checkpoint = Path(summaries[-1]["checkpoint"])
    exported = export_checkpoint(checkpoint, folder / "hf", overwrite=True)
    print(f"exported to Hugging Face format: {exported}")
    media = demo_media()
    print(f"\nasked after stage {len(configs)}:")
    for file, question, style in QUESTIONS:
        content = (media / file).read_bytes()
        images, video = ([], content) if file.endswith(".mp4") else ([content], None)
        print(f"  {file}: {question}\n    {answer(checkpoint, Prompt(question, images, video, style))}", flush=True)
    print()
    print_table("Molmo2 tiny, stage by stage", summaries)
    title = f"Molmo2 tiny: {', '.join(cfg.stage.name for cfg in configs)}"
    losses = {cfg.stage.name: read_metrics(stage_dir(cfg)) for cfg in configs}
    curves = plot_losses(title, losses, folder / "losses.png")
    print(f"loss curves: {curves}\n\nscores of each stage on the shards of sft, in percent:")
    print(f"{scores_of_stages(configs)}\n")
    print(f"took {int(seconds) // 60} min {int(seconds) % 60} s")


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
