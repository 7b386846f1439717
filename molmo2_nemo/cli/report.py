"""One HTML page about a run: its stages in a table, curves of loss, speed and fill, what was skipped, the settings.
The page is one file without links to others, so it can be sent to anyone. With --card, a card for programs instead."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from molmo2_nemo.cli.options import check_file
from molmo2_nemo.errors import read_text, writing

EXAMPLES = """\
examples:
  molmo2 report runs/8b
  molmo2 report runs/8b --out page.html
  molmo2 report runs/8b --card            # card.json: what ran, on what, and what came of it
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="output_dir of a run, or the folder of one stage")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the run's folder)")
    parser.add_argument(
        "--card",
        action="store_true",
        help="write a card as JSON instead: command, commit, versions, data, layout, losses, speed, scores (card.json)",
    )


def run(args: argparse.Namespace) -> int:
    if args.card:
        return write_card(args)
    from molmo2_nemo.files import write_text
    from molmo2_nemo.preview.report import page
    from molmo2_nemo.rundir.card import CARD
    from molmo2_nemo.rundir.progress import read_run

    stages = read_run(args.folder)
    out: Path = args.out or Path(args.folder) / "report.html"
    check_file("--out", out)
    card = Path(args.folder) / CARD
    text = page(stages, str(args.folder), read_text(card) if card.is_file() else None)
    if out.is_file() or not out.exists():
        write_text(out, text)  # the page of an earlier call stays where there is no room for this one
    else:  # a pipe, a terminal
        with writing(out):
            out.write_text(text, encoding="utf-8")
    print(out)
    return 0


def write_card(args: argparse.Namespace) -> int:
    """Writes the run's card and names, in one line each, the stages of which something is unknown."""
    from molmo2_nemo.files import write_json
    from molmo2_nemo.rundir.card import CARD, run_card

    out: Path = args.out or Path(args.folder) / CARD
    card = run_card(args.folder)
    check_file("--out", out)
    write_json(out, card)
    for stage in card["stages"]:
        if stage.get("unknown"):
            print(f"{stage['stage']}: the run's files do not say {', '.join(stage['unknown'])}", file=sys.stderr)
    print(out)
    return 0
