"""Scores of a trained model on tasks: published benchmarks, records of your own, needles. Settings of the layout are
written key=value, as for training; a checkpoint can be loaded under any."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2_nemo.cli.options import (
    add_judge_arguments,
    add_sampling_arguments,
    add_shown_arguments,
    check_numbers,
    check_writable,
    checkpoint_of,
    judge_of,
    on_ranks,
    sampling_of,
    shown_of,
    warn,
    warn_once,
)
from molmo2_nemo.errors import UserError, of_setting, writing
from molmo2_nemo.settings.run import EvaluationConfig

LOGGED = 60.0  # seconds between two lines of a log that say how far a task is
IN_NO_RUN = "the checkpoint lies in no run; --out DIR"
Done = tuple["Task", dict[str, Any], list[dict[str, Any]]]  # a task, its settings, its answered questions

if TYPE_CHECKING:
    from molmo2_nemo.evaluation.judge import Judge
    from molmo2_nemo.evaluation.suite import Pass
    from molmo2_nemo.evaluation.task import Task
    from molmo2_nemo.inference.prompt import Shown
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
        help="a checkpoint, or the folder of a stage or run; then the layout, such as parallel.tensor=2",
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
    add_shown_arguments(parser, passes=True)
    parser.add_argument(
        "--depths",
        type=int,
        default=EvaluationConfig.depths,
        metavar="N",
        help=f"needle: places in the haystack (default: {EvaluationConfig.depths})",
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
        alone(args, "list", and_words=False)
        print(listed())
        return 0
    if args.compare:
        alone(args, "compare", and_words=True)
        print(compared(args.overrides))
        return 0
    from molmo2_nemo.processes import quiet

    asked = read(args)
    quiet()
    check(asked)
    if asked.out is not None:
        check_writable("--out", asked.out)
    warn_once([] if asked.out else [f"results will be shown and not written: {IN_NO_RUN}"])
    return on_ranks(args, asked.layout, lambda: evaluated(asked))


def check(asked: Asked) -> None:
    """What is not there or cannot be had is said before processes start or weights are read.

    Raises:
        UserError: data that are not there, or a layout, media or answers that the model or the machine has no room for.
    """
    from molmo2_nemo.evaluation.suite import check_passes
    from molmo2_nemo.launch.answering import check_answering

    args, work = asked.args, passes_of(asked)
    for option, given, has in (
        ("--frames", args.frames is not None, any(task.video for task in asked.tasks)),
        ("--fps", args.fps is not None, any(task.video for task in asked.tasks)),
        ("--depths", args.depths != EvaluationConfig.depths, any(task.name == "needle" for task in asked.tasks)),
    ):
        if given and not has:
            kind = "the task needle" if option == "--depths" else "a task on videos"
            warn_once([f"{option} has no effect: {kind} is not among these"])
    if asked.out is not None:
        warn_once([text for one in work for text in fewer(asked.out, one)])
    check_answering(
        asked.checkpoint,
        asked.layout,
        shown_but_frames(args),
        frames=sorted({one.settings.frames for one in work if one.settings.frames is not None}),
        longest=args.max_new_tokens,
        beyond=args.beyond_range,
        more=lambda data: check_passes(work, data),
    )


def shown_but_frames(args: argparse.Namespace) -> Shown:
    return shown_of(argparse.Namespace(**{**vars(args), "frames": None}))


def alone(args: argparse.Namespace, option: str, *, and_words: bool) -> None:
    """Refuses what would have no effect beside an option that evaluates nothing.

    Args:
        and_words: whether words without an option belong to it.

    Raises:
        UserError: names the first.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, usual in vars(parser.parse_args([])).items():
        if name != option and getattr(args, name) != usual and not (and_words and name == "overrides"):
            said = f"--{name.replace('_', '-')}" if name != "overrides" else args.overrides[0]
            raise UserError(f"--{option} evaluates nothing, so {said} has no effect; leave it out")


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

    # .../checkpoints/step=50 is one, whether it is there or not
    places = [w for w in args.overrides if "=" not in w or "/" in w.partition("=")[0] or Path(w).is_dir()]
    if len(places) != 1:
        raise UserError(f"name one checkpoint, stage or run to evaluate, not {len(places)}; --compare takes several")
    check_numbers(args, {"limit": 1, "depths": 1, "batch_tokens": 1, "max_new_tokens": 1})
    layout = layout_of([word for word in args.overrides if word not in places])
    names = [name.strip() for name in (args.tasks or (AUTO if args.data else "")).split(",") if name.strip()]
    tasks, frames = chosen(names, args.data), passes(args.frames)
    checkpoint = checkpoint_of(args, places[0])
    run = run_of_checkpoint(checkpoint)
    out = args.out or (None if run is None else run / EVALUATION / checkpoint.name)
    return Asked(args, checkpoint, layout, tasks, frames, out, judge_of(args, out))


def passes(frames: str | None) -> list[int | None]:
    """The numbers of --frames; one pass with the run's own where there are none."""
    if frames is None:
        return [None]
    words = [word.strip() for word in frames.split(",")]
    numbers = [int(word) for word in words if word.isdecimal() and len(word) < 20]
    if len(numbers) < len(words) or min(numbers) < 1 or len(set(numbers)) < len(words):
        raise UserError(f"--frames {frames}: numbers of frames above 0, each once, with commas between")
    return [*numbers]


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

    from molmo2_nemo.evaluation.kept import KeptAnswers, digest_of_checkpoint
    from molmo2_nemo.evaluation.results import table, wrapped
    from molmo2_nemo.evaluation.suite import said_of_media
    from molmo2_nemo.inference.engine import Generator
    from molmo2_nemo.inference.load import load
    from molmo2_nemo.inference.ranks import is_first

    args, sampling, work = asked.args, sampling_of(asked.args), passes_of(asked)
    shown = shown_but_frames(args)
    model, builder, tokenizer = load(asked.checkpoint, shown, asked.layout)
    generator = Generator(model, tokenizer, batch_tokens=args.batch_tokens)
    done: list[Done] = []
    results: list[dict[str, Any]] = []
    written, notes, checkpoint = 0, [], digest_of_checkpoint(asked.checkpoint)
    answers = {one.name: KeptAnswers(asked.out, one.name, checkpoint) for one in work}
    try:
        for one in work:
            kept = answers[one.name]
            longest = replace(sampling, max_new_tokens=args.max_new_tokens or one.task.max_new_tokens)
            with progress(one.task.name, one.count, is_first()) as advance:
                found = one.run(generator, builder, longest, made_with(asked), advance, kept=kept)
            assert found is not None
            notes += kept.said(len(found[1]))
            done.append((one.task, found[0]["settings"], found[1]))
            if is_first():
                results.append(found[0])
                keep(asked, *done[-1])
                written += 1
                draw(asked, one.task, [line for task, _, lines in done if task is one.task for line in lines])
                if asked.judge is None:
                    kept.remove()
        notes += said_of_media(generator)
    except KeyboardInterrupt:
        if is_first():
            begun = [one.name for one in work if answers[one.name].any()]
            warn([left_by_interrupt(asked, [one.name for one in work], written, begun)])
        raise
    except (UserError, OSError):
        if results and is_first():  # answers that cannot be written down are shown
            print(table(results))
        raise
    if is_first():
        if asked.judge is not None:  # at the end, as no other rank is to wait for it
            results = judged(asked, asked.judge, done)
        print("\n".join([table(results), *wrapped(notes)]))
        print(f"written to {asked.out}" if asked.out else f"not written anywhere: {IN_NO_RUN}")
    return 0


def judged(asked: Asked, judge: Judge, done: list[Done]) -> list[dict[str, Any]]:
    """The results with what the judge says of them, written; what it replied is kept as it comes."""
    from molmo2_nemo.evaluation.judge import REPLIES

    try:
        results = [keep(asked, *one, judged_by(judge, one[-1])) for one in done]
    except KeyboardInterrupt:
        said = f"all other scores and the answers are in {asked.out}, the judge's replies so far in its {REPLIES}"
        warn([f"interrupted: {said}; the same command asks for the rest"])
        raise
    warn([] if judge.given else ["--judge was not asked: none of these tasks' answers are captions"])
    return results


def draw(asked: Asked, task: Task, lines: list[dict[str, Any]]) -> None:
    if asked.out is not None:
        with of_setting(f"--out {asked.out}"), writing(asked.out):
            task.draw(lines, asked.out)


def left_by_interrupt(asked: Asked, names: list[str], done: int, begun: list[str]) -> str:
    """What to say of an evaluation that ends early.

    Args:
        names: of all results, in the order of the work.
        done: how many of them are there.
        begun: results with answers that are kept.
    """
    left = names[done:]
    parts, lost = [names[:done], [n for n in left if n in begun]], [n for n in left if n not in begun]
    said = []
    if parts[0] and asked.out:
        said.append(f"{', '.join(parts[0])} {'is' if done == 1 else 'are'} in {asked.out}")
    if parts[1]:
        said.append(f"of {', '.join(parts[1])} the answers so far are kept, from which the same command goes on")
    if lost:
        said.append(f"of {', '.join(lost)} nothing is kept")
    return f"interrupted: {'; '.join(said)}"


def made_with(asked: Asked) -> dict[str, Any]:
    """What a result notes of the command; null: as the model's run has it."""
    args = asked.args
    shown = {"fps": args.fps, "max_crops": args.max_crops, "high_res": args.high_res or None}
    return {"checkpoint": asked.checkpoint.name, **shown}


def keep(
    asked: Asked, task: Task, made_with: dict[str, Any], lines: list[dict[str, Any]], more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The result of a task, with what `more` adds, after it is written."""
    from molmo2_nemo.evaluation.results import result_of, write_result

    result = result_of(task.name, task.group, lines, made_with) | (more or {})
    if asked.out is not None:
        with of_setting(f"--out {asked.out}"):
            warn(replaced(asked.out, result))
            write_result(asked.out, result, lines)
    return result


def replaced(folder: Path, result: dict[str, Any]) -> list[str]:
    """What to say where a result takes the place of one over other questions, of other data under the same name."""
    from molmo2_nemo.evaluation.results import called
    from molmo2_nemo.rundir.results import read_result

    path = folder / f"{called(result)}.json"
    try:
        old = read_result(path) if path.is_file() else None
    except UserError:
        return [f"{path}: a damaged result was there, and is replaced"]
    if old is None or old.get("questions_sha256") in (None, result["questions_sha256"]):
        return []
    return [f"{path}: a result over {old['questions']:,} other questions was there, and is replaced"]


def fewer(folder: Path, one: Pass) -> list[str]:
    """What to say before a pass with --limit is run, where it is to replace a result over more items."""
    from molmo2_nemo.rundir.results import read_result

    path = folder / f"{one.name}.json"
    try:
        old = read_result(path) if path.is_file() else None
    except UserError:
        old = None  # `replaced` names it
    had = min(((old or {}).get("settings") or {}).get("limit") or len(one.items), len(one.items))
    if old is None or one.count >= had:
        return []
    return [f"{path} is over {had:,} items, and will be replaced by a result over {one.count:,}; --out DIR keeps both"]


def judged_by(judge: Judge, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Lets the judge score the answers that it goes with, and says how many it did not judge; what the results tell
    of it."""
    said = judge.score_lines(lines)
    warn(said)
    return {"judge": {"model": judge.chat.model, "said": said}}


def progress(name: str, count: int, shown: bool) -> Any:
    """A bar on the terminal, or a line now and then in a log; yields what is called with the number of each item that
    this rank begins, counted from 0."""
    from contextlib import contextmanager

    last = time.monotonic()

    def line(item: int) -> None:
        nonlocal last
        if shown and time.monotonic() - last >= LOGGED:
            last = time.monotonic()
            print(f"{name}: item {item + 1:,} of {count:,}", file=sys.stderr, flush=True)

    @contextmanager
    def bar() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as made:
            row = made.add_task(name, total=count)
            yield (lambda done: made.update(row, completed=done)) if console.is_terminal else line

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
    from molmo2_nemo.evaluation.results import comparison
    from molmo2_nemo.rundir.config_file import run_of_checkpoint
    from molmo2_nemo.rundir.paths import EVALUATION
    from molmo2_nemo.rundir.results import read_results
    from molmo2_nemo.rundir.summary import resolve_checkpoint

    if len(words) < 2 or len({Path(word).resolve() for word in words}) < len(words):
        raise UserError("--compare: name two or more stages, runs, or folders of results, each once")
    runs: dict[str, list[dict[str, Any]]] = {}
    seen: set[Path] = set()
    for word in words:
        folder, run = Path(word), None
        if not (results := read_results(folder)):
            remarks: list[str] = []
            checkpoint = resolve_checkpoint(word, remarks)
            warn(remarks)
            if (run := run_of_checkpoint(checkpoint)) is not None:
                folder = run / EVALUATION / checkpoint.name
                results = read_results(folder)
        if not results:
            first = f"first `molmo2 evaluate {word} --tasks ..." + ("`" if run else " --out DIR`, and name DIR here")
            raise UserError(f"{word}: no results there; {first}{'' if run else ', as it lies in no run'}")
        if folder.resolve() in seen:
            raise UserError(f"--compare: the results of {word} are in {folder}, which another word names, too")
        seen.add(folder.resolve())
        runs[word] = list(results.values())
    names = {word: Path(word).resolve().name for word in words}
    if len(set(names.values())) == len(words):  # short enough for a table's head
        runs = {names[word]: results for word, results in runs.items()}
    return comparison(runs)
