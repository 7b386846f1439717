"""The wordings of prompts: read the published ones out of your own checkout of the official repository.

`import` parses its files as data (nothing of them is run) and writes one JSON file; data.text.templates=FILE uses
it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2_nemo.cli.options import check_file

if TYPE_CHECKING:
    from molmo2_nemo.data.wordings import Wordings

EXAMPLES = """\
examples:
  git clone https://github.com/allenai/molmo2
  molmo2 templates import molmo2 --out wordings.json
  molmo2 templates check wordings.json
  molmo2 train recipe=4b stage=sft data.text.templates=wordings.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    reader = _action(
        actions,
        "import",
        "read the wordings of a checkout of allenai/molmo2 into one JSON file",
        "examples:\n  molmo2 templates import molmo2 --out wordings.json\n",
    )
    reader.add_argument("folder", metavar="DIR", help="the checkout")
    reader.add_argument("--out", required=True, metavar="FILE", help="where the JSON goes")
    checker = _action(
        actions,
        "check",
        "what a file of wordings holds, and whether it is as it was imported",
        "examples:\n  molmo2 templates check wordings.json\n",
    )
    checker.add_argument("file", metavar="FILE", help="what import wrote, or the copy in a run's folder")


def _action(actions: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text, epilog=examples)
    return made


def run(args: argparse.Namespace) -> int:
    return {"import": _import, "check": _check}[args.action](args)


def _import(args: argparse.Namespace) -> int:
    from molmo2_nemo.data.published_wordings import read_checkout
    from molmo2_nemo.data.wordings import NOT_PUBLISHED, save

    out = Path(args.out)
    check_file("--out", out)
    found = read_checkout(Path(args.folder))
    save(found.wordings, out)
    _show(found.wordings)
    for note in found.notes:
        print(f"not as expected: {note}")
    print(f"not published, this project's own: {', '.join(NOT_PUBLISHED)}")
    print(f"{out}: use it with data.text.templates={out}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from molmo2_nemo.data.wordings import load

    _show(load(args.file))
    return 0


def _show(wordings: Wordings) -> None:
    assert wordings.choice is not None
    for name, texts in wordings.lists.items():
        print(f"  {name:45} {len(texts):4}")
    for name, texts in asdict(wordings.choice).items():
        print(f"  {'multiple choice, ' + name:45} {len(texts):4}")
    source = wordings.source
    print(f"from {source.get('repository', 'an unknown place')}, commit {source.get('commit') or 'unknown'}")
    print(f"fingerprint {wordings.fingerprint()}")
