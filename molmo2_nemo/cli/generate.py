"""Answers of a trained model to a file of prompts, or to records of a data set as training formats them, each beside
its reference; with --score, how good they are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2_nemo.cli.options import (
    add_layout_arguments,
    add_sampling_arguments,
    add_shown_arguments,
    check_file,
    check_numbers,
    checkpoint_of,
    on_ranks,
    sampling_of,
    shown_of,
    warn,
    warn_once,
)
from molmo2_nemo.data.media import said_of_cut
from molmo2_nemo.errors import UserError, writing
from molmo2_nemo.evaluation.scorers import scorer_names
from molmo2_nemo.evaluation.scoring import Scoring

if TYPE_CHECKING:
    from molmo2_nemo.inference.prompt import Prompt

EXAMPLES = """\
examples:
  molmo2 generate demo/run --data demo/data/sft --examples 5
  molmo2 generate runs/8b prompts.jsonl --out answers.jsonl --score exact_match,anls
  a line of prompts.jsonl: {"question": "What is this?", "image": "cat.jpg", "answer": "A cat."}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a stage or run")
    parser.add_argument("prompts", nargs="?", type=Path, help="JSON lines; media paths are relative to the file")
    parser.add_argument("--data", metavar="DIR", help="a folder of shards to take records from, instead of prompts")
    parser.add_argument("--examples", type=int, default=10, metavar="N", help="records of --data (default: 10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines there too")
    add_shown_arguments(parser)
    add_sampling_arguments(parser)
    add_layout_arguments(parser)
    names = ", ".join(scorer_names())
    parser.add_argument("--score", metavar="NAME[,NAME]", help=f"score answers against their references: {names}")


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.evaluation.prompt_file import read_prompts, without_effect
    from molmo2_nemo.launch.ranks import layout_of
    from molmo2_nemo.processes import quiet
    from molmo2_nemo.rundir.config_file import truncated_of_checkpoint

    if (args.prompts is None) == (args.data is None):
        raise UserError("name either a file of prompts or --data with a folder of shards")
    check_numbers(args, {"examples": 1})
    sampling, shown, layout = sampling_of(args), shown_of(args), layout_of(args.layout)
    if args.out:
        check_file("--out", args.out)
    scoring = (
        Scoring([name.strip() for name in args.score.split(",") if name.strip()]) if args.score is not None else None
    )
    checkpoint = checkpoint_of(args, args.checkpoint)
    cut: list[Path] = []
    prompts = read_prompts(args.prompts, cut) if args.prompts else None
    warn_once(said_of_cut(cut, truncated_of_checkpoint(checkpoint)))
    if scoring is not None and prompts is None:
        scoring.needs(1)  # reference answer of each record
    elif scoring is not None:
        check_references(scoring, args.prompts, prompts or [])
    warn_once(without_effect(shown, prompts) if prompts is not None else ())
    quiet()
    from molmo2_nemo.launch.answering import check_answering  # with torch: after what needs none

    check_answering(checkpoint, layout, shown, longest=sampling.max_new_tokens, beyond=args.beyond_range)

    def work() -> int:
        from molmo2_nemo.inference.generate import answer_prompts, answer_records

        if prompts is not None:
            found: Iterator[dict[str, Any]] = answer_prompts(checkpoint, prompts, sampling, shown, layout)
        else:
            found = answer_records(checkpoint, args.data, args.examples, sampling, shown, layout)
        write_answers(found, args.out, scoring)
        return 0

    return on_ranks(args, layout, work)


def check_references(scoring: Scoring, path: Path, prompts: Sequence[Prompt]) -> None:
    """Raises UserError: prompts whose answers cannot be scored; the first ones, and how many there are."""
    from molmo2_nemo.evaluation.prompt_file import refuse

    faults = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            scoring.references(f"{path}: prompt {number}", prompt.reference)
        except UserError as error:
            faults.append(str(error))
    refuse(faults, "prompts cannot be scored")


def write_answers(found: Iterable[dict[str, Any]], out: Path | None, scoring: Scoring | None) -> None:
    """Shows answers as they come, each with its scores, and writes them to `out`, on the first rank; at the end, the
    scorers' figures.

    Raises:
        UserError: an answer to score has no reference.
    """
    from molmo2_nemo.inference.ranks import is_first

    for number, line in enumerate(found):
        if scoring is not None:
            line["scores"] = scoring.score(line["key"], line["answer"], line["reference"])
        warn(f"{line['key']}: {remark}" for remark in line.pop("remarks", ()))
        show(line)
        if out and is_first():  # ranks know each other once there is an answer
            with writing(out), out.open("a" if number else "w", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if scoring is not None:
        print(scoring.table())


def show(line: dict[str, Any]) -> None:
    """Prints one answer, beside its references and scores."""
    print(f"{line['key']}\n  asked     {_short(line['question'])}\n  answered  {_short(line['answer'])}")
    if line.get("reference") is not None:
        given = line["reference"] if isinstance(line["reference"], list) else [line["reference"]]
        texts = (one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in given)
        print(f"  reference {' | '.join(map(_short, texts))}")
    if "scores" in line:
        print("  score     " + "  ".join(f"{name} {score['value']:.2f}" for name, score in line["scores"].items()))
    print(flush=True)


def _short(text: str, length: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + " ..."
