"""Scores of a trained model on tasks: published benchmarks, records of your own, needles. Settings of the layout are
written key=value, as for training; a checkpoint can be loaded under any."""

from __future__ import annotations

import argparse
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2_nemo.cli.options import (
    add_judge_arguments,
    add_sampling_arguments,
    check_folder,
    check_numbers,
    judge_of,
    on_ranks,
    sampling_of,
    shown_of,
    warn,
)
from molmo2_nemo.errors import UserError, of_setting

if TYPE_CHECKING:
    from molmo2_nemo.evaluation.judge import Judge
    from molmo2_nemo.evaluation.suite import Pass
    from molmo2_nemo.evaluation.task import Task
    from molmo2_nemo.settings.run import ParallelConfig

EXAMPLES = """\
examples:
  molmo2 evaluate runs/8b --tasks chartqa,docvqa --limit 200
  molmo2 evaluate runs/8b --data shards/held --tasks auto parallel.tensor=2 parallel.data=2
  molmo2 evaluate runs/8b --tasks needle --frames 128,224,384 --depths 10
  molmo2 evaluate --compare runs/8b/sft runs/8b/long
  molmo2 evaluate --list
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="CHECKPOINT | KEY=VALUE",
        help="a checkpoint, or the folder of a finished stage or run; then the layout, such as parallel.tensor=2",
    )
    parser.add_argument("--tasks", metavar="NAME[,NAME]", help="tasks by name; auto: --data, scored by its styles")
    parser.add_argument("--list", action="store_true", help="say which tasks there are, and stop")
    parser.add_argument(
        "--compare", action="store_true", help="no evaluation: show several models' results side by side"
    )
    parser.add_argument("--data", metavar="DIR", help="a folder of shards of your own, for the task auto")
    parser.add_argument(
        "--root", metavar="DIR", help="folder of the tasks' data sets (default: $MOLMO2_DATA, or shards)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items (records) of each task")
    parser.add_argument("--frames", metavar="N[,N]", help="most frames of a video, one pass each (default: the run's)")
    parser.add_argument("--fps", type=float, metavar="N", help="most frames per second of a video (default: the run's)")
    parser.add_argument("--max-crops", type=int, metavar="N", help="most tiles of an image (default: the run's)")
    parser.add_argument("--high-res", action="store_true", help="tiles of an image as in training's high resolution")
    parser.add_argument(
        "--depths", type=int, default=10, metavar="N", help="needle: places in the haystack (default: 10)"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=16_384, metavar="N", help="tokens of prompts answered together"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: evaluation/ in the stage's folder)"
    )
    add_sampling_arguments(parser, longest=None)
    add_judge_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.list:
        print(listed())
        return 0
    if args.compare:
        print(compared(args.overrides))
        return 0
    asked = read(args)
    passes_of(asked)  # what is not there, or cannot be written, is said before processes start
    if asked.out is not None:
        check_folder("--out", asked.out)
        with of_setting(f"--out {asked.out}"):
            asked.out.mkdir(parents=True, exist_ok=True)
            probe = asked.out / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
    return on_ranks(args, asked.layout, lambda: evaluated(asked))


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    args: argparse.Namespace
    checkpoint: Path
    layout: ParallelConfig
    tasks: list[Task]
    frames: list[int | None]  # passes
    out: Path | None
    judge: Judge | None = None


def read(args: argparse.Namespace) -> Asked:
    """Raises UserError: a word, number or folder that cannot be meant; names it."""
    from molmo2_nemo.evaluation.suite import chosen
    from molmo2_nemo.evaluation.tasks import AUTO
    from molmo2_nemo.launch.ranks import layout_of
    from molmo2_nemo.rundir.config_file import run_of_checkpoint
    from molmo2_nemo.rundir.paths import EVALUATION
    from molmo2_nemo.rundir.summary import resolve_checkpoint

    places = [word for word in args.overrides if "=" not in word or Path(word).is_dir()]  # .../checkpoints/step=50
    if len(places) != 1:
        raise UserError(f"name one checkpoint, stage or run to evaluate, not {len(places)}; --compare takes several")
    check_numbers(args, {"limit": 1, "depths": 1, "batch_tokens": 1, "max_new_tokens": 1})
    layout = layout_of([word for word in args.overrides if word not in places])
    names = [name.strip() for name in (args.tasks or (AUTO if args.data else "")).split(",") if name.strip()]
    tasks, frames = chosen(names, args.data), passes(args.frames)
    checkpoint = resolve_checkpoint(places[0])
    run = run_of_checkpoint(checkpoint)
    out = args.out or (None if run is None else run / EVALUATION / checkpoint.name)
    return Asked(args, checkpoint, layout, tasks, frames, out, judge_of(args, out))


def passes(frames: str | None) -> list[int | None]:
    """The numbers of --frames; one pass with the run's own where there are none."""
    if frames is None:
        return [None]
    words = frames.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words) or len(set(map(int, words))) < len(words):
        raise UserError(f"--frames {frames}: numbers of frames above 0, each once, with commas between")
    return [int(word) for word in words]


def passes_of(asked: Asked) -> list[Pass]:
    """Raises UserError: data that are not there."""
    from molmo2_nemo.evaluation.suite import opened
    from molmo2_nemo.evaluation.task import TaskSettings

    args = asked.args
    root = Path(args.root or os.environ.get("MOLMO2_DATA", "shards"))
    return opened(asked.tasks, TaskSettings(root, args.limit, args.seed, depths=args.depths), asked.frames)


def evaluated(asked: Asked) -> int:
    """Evaluates, on this process or this rank; shows and writes what came of it."""
    from dataclasses import replace

    from molmo2_nemo.processes import quiet

    work = passes_of(asked)
    quiet()
    from molmo2_nemo.evaluation.results import table
    from molmo2_nemo.inference.engine import Generator
    from molmo2_nemo.inference.load import load
    from molmo2_nemo.inference.ranks import is_first

    args, sampling = asked.args, sampling_of(asked.args)
    shown = shown_of(argparse.Namespace(**{**vars(args), "frames": None}))
    model, builder, tokenizer = load(asked.checkpoint, shown, asked.layout)
    generator = Generator(model, tokenizer, batch_tokens=args.batch_tokens)
    done, results = [], []
    for one in work:
        longest = replace(sampling, max_new_tokens=args.max_new_tokens or one.task.max_new_tokens)
        with progress(one.task.name, one.count, is_first()) as advance:
            found = one.run(generator, builder, longest, {"checkpoint": asked.checkpoint.name}, advance)
        assert found is not None
        done.append((one.task, found[0]["settings"], found[1]))
        if is_first():
            results.append(kept(asked, *done[-1]))
            if asked.out is not None:
                with of_setting(f"--out {asked.out}"):
                    one.task.draw([line for task, _, lines in done if task is one.task for line in lines], asked.out)
    if is_first():
        if asked.judge is not None:  # at the end, as no other rank is to wait for it
            results = [kept(asked, *one, judged_by(asked.judge, one[-1])) for one in done]
            warn([] if asked.judge.given else ["--judge was not asked: none of these tasks' answers are captions"])
        print(table(results))
        print(
            f"written to {asked.out}" if asked.out else "not written anywhere: the checkpoint lies in no run; --out DIR"
        )
    return 0


def kept(
    asked: Asked, task: Task, made_with: dict[str, Any], lines: list[dict[str, Any]], more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The result of a task, with what `more` adds, after it is written."""
    from molmo2_nemo.evaluation.results import result_of, write_result

    result = result_of(task.name, task.group, lines, made_with) | (more or {})
    if asked.out is not None:
        with of_setting(f"--out {asked.out}"):
            write_result(asked.out, result, lines)
    return result


def judged_by(judge: Judge, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Lets the judge score the answers that it goes with, and says how many it did not judge; what the results tell
    of it."""
    said = judge.score_lines(lines)
    warn(said)
    return {"judge": {"model": judge.chat.model, "said": said}}


def progress(name: str, count: int, shown: bool) -> Any:
    """A bar on the terminal; yields what is called with the number of items that this rank has begun."""
    from contextlib import contextmanager

    @contextmanager
    def bar() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as made:
            row = made.add_task(name, total=count)
            yield lambda done: made.update(row, completed=done)

    return bar()


def listed() -> str:
    """The tasks, their groups and what they are."""
    from molmo2_nemo.evaluation.results import GROUPS
    from molmo2_nemo.evaluation.tasks import find_task, task_names

    tasks = [find_task(name) for name in task_names()]
    lines: list[str] = []
    wide = max(len(task.name) for task in tasks)
    for group in GROUPS:
        own = [task for task in tasks if task.group == group]
        lines += [group] * bool(own)
        for task in own:
            lines += textwrap.wrap(f"  {task.name:{wide}}  {task.title}", 80, subsequent_indent=" " * (wide + 4))
    return "\n".join([*lines, "auto: records of your own (--data), scored by their style"])


def compared(words: list[str]) -> str:
    """The results of several models side by side.

    Raises:
        UserError: fewer than two, or one without results.
    """
    from molmo2_nemo.evaluation.results import comparison, read_results
    from molmo2_nemo.rundir.config_file import run_of_checkpoint
    from molmo2_nemo.rundir.paths import EVALUATION
    from molmo2_nemo.rundir.summary import resolve_checkpoint

    if len(words) < 2 or len(set(words)) < len(words):
        raise UserError("--compare: name two or more stages, runs, or folders of results, each once")
    runs = {}
    for word in words:
        results = read_results(Path(word)) if Path(word).is_dir() else []
        if not results:
            checkpoint = resolve_checkpoint(word)
            run = run_of_checkpoint(checkpoint)
            results = read_results(run / EVALUATION / checkpoint.name) if run is not None else []
        if not results:
            raise UserError(f"{word}: no results there; first `molmo2 evaluate {word} --tasks ...`")
        runs[word] = results
    names = {word: Path(word).resolve().name for word in words}
    if len(set(names.values())) == len(words):  # short enough for a table's head
        runs = {names[word]: results for word, results in runs.items()}
    return comparison(runs)
