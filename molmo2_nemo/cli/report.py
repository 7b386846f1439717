"""One HTML page about a run: its stages in a table, curves of loss, speed and fill, what was skipped, the settings.
The page is one file without links to others, so it can be sent to anyone."""

from __future__ import annotations

import argparse
from pathlib import Path

from molmo2_nemo.cli.options import check_file
from molmo2_nemo.errors import writing

EXAMPLES = """\
examples:
  molmo2 report runs/8b
  molmo2 report runs/8b --out page.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="output_dir of a run, or the folder of one stage")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the run's folder)")


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.preview.report import page
    from molmo2_nemo.rundir.progress import read_run

    stages = read_run(args.folder)
    out: Path = args.out or Path(args.folder) / "report.html"
    check_file("--out", out)
    text = page(stages, str(args.folder))
    with writing(out):
        out.write_text(text, encoding="utf-8")
    print(out)
    return 0
