"""The `molmo2` command. Every verb is a small module here; nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from molmo2_nemo.cli.completion import ShellCompletion, verb_parsers
from molmo2_nemo.cli.help import Parser
from molmo2_nemo.errors import INTERRUPTED, USER_ERROR, nearest, show_error, user_message, verbose
from molmo2_nemo.rundir.code_state import COMMAND

VERBS = {
    "demo": "the whole recipe on this machine's CPU, in minutes",
    "train": "run one stage",
    "pipeline": "run a recipe's stages, each from the weights of the one before; finished ones are skipped",
    "plan": "what fits on a cluster, how fast, in how many GPU-hours",
    "prepare": "turn data sets, published or your own, into training shards",
    "shards": "check, repair, index and describe shards",
    "templates": "read the published wordings of prompts out of your own checkout of them",
    "mixture": "the data sets of a stage and the share of each",
    "preview": "draw what the model sees: crops, frames, tokens, trees, masks",
    "status": "where each stage of a run stands, from its files",
    "report": "one HTML page with the curves of a run's stages",
    "generate": "answer a file of prompts or the records of shards, beside the reference answers",
    "evaluate": "score a trained model on tasks; compare models",
    "ask": "ask a trained model about an image or a video",
    "convert": "turn Hugging Face weights into a checkpoint and back",
    "doctor": "what is installed, what is missing, and how to get it",
}

EPILOG = """\
examples:
  molmo2 demo                                   # a first look
  molmo2 train recipe=tiny stage=sft stage.max_steps=20
  molmo2 pipeline recipe=tiny                   # all stages
  molmo2 train recipe=8b stage=long --cfg job   # what would run
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = Parser(
        prog="molmo2",
        description="Train Molmo2 in three chained stages on NeMo and Megatron-core.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument(
        "--shell-completion",
        "-sc",
        action=ShellCompletion,
        metavar="install=SHELL",
        help='print what makes the shell complete this command: eval "$(molmo2 -sc install=bash)" (or zsh, fish)',
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        module = importlib.import_module(f"molmo2_nemo.cli.{name}")
        verb = verbs.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=module.EXAMPLES,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def parser_of(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the verb, and of the verb inside it, that the command line's first words name."""
    for word in words:
        if word not in verb_parsers(parser):
            break
        parser = verb_parsers(parser)[word]
    return parser


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return f"molmo2_nemo {installed('molmo2_nemo')}"
    except PackageNotFoundError:
        return "molmo2_nemo (not installed, run from its sources)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 2 for a user's mistake, a file that cannot be read or written or a
    missing package, 130 after Ctrl-C. A fault in our code is raised."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in VERBS and not words[0].startswith("-"):
        parser.error(f"no verb {words[0]!r}; {nearest(words[0], VERBS)}")
    args, rest = parser.parse_known_args(words)
    unknown = [a for a in rest if a.startswith("-")]
    if unknown and unknown[0].startswith("--"):
        option, verb = unknown[0].split("=")[0], parser_of(parser, words)
        parser.error(f"{option}: no such option of {verb.prog}; {nearest(option, verb._option_string_actions)}")
    if rest and (unknown or not hasattr(args, "overrides")):
        parser.error(f"unrecognized: {' '.join(unknown or rest)}; see molmo2 {args.verb} --help")
    if rest:  # settings that came after an option
        args.overrides.extend(rest)
    args.argv = words
    os.environ[COMMAND] = shlex.join(["molmo2", *args.argv])
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        if verbose():
            traceback.print_exception(error)
        show_error(message)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
