"""Ask a trained model: answers from a Megatron checkpoint, on one process or on the ranks of a layout.

To serve a Molmo2 to many, export it to Hugging Face format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.example import ROOT_BRANCH, Example
from molmo2_nemo.data.tally import KINDS, counted
from molmo2_nemo.errors import UserError
from molmo2_nemo.inference.engine import LENGTH, Generator
from molmo2_nemo.inference.load import load
from molmo2_nemo.inference.prompt import Prompt, Shown
from molmo2_nemo.inference.ranks import gathered, place
from molmo2_nemo.inference.sampling import Sampling
from molmo2_nemo.settings.run import ParallelConfig

TOGETHER = 64, 2**29  # prompts that are held in memory at once, and bytes of their crops
# Of a prompt: key, question and more, among it remarks; what the model reads; the number that its draws follow from
Asked = tuple[dict[str, Any], Example, int]


def answer(
    checkpoint: str | Path,
    prompt: Prompt,
    sampling: Sampling | None = None,
    shown: Shown | None = None,
    remarks: list[str] | None = None,
    layout: ParallelConfig | None = None,
) -> str:
    """The model's answer to a question about images or a video.

    Args:
        checkpoint: a Megatron checkpoint, written under any layout; tokenizer and image settings are those of its run.
        sampling: default: greedy.
        shown: what replaces the run's settings.
        remarks: gets what was left out, cut off or replaced of the media, and whether the answer is cut off.
        layout: of the ranks that call this together; default: this process alone.

    Raises:
        UserError: not a Molmo2 checkpoint, or media that cannot be read.
    """
    (line,) = answer_prompts(Path(checkpoint), [prompt], sampling, shown, layout)
    if remarks is not None:
        remarks += line["remarks"]
    return str(line["answer"])


def answer_prompts(
    checkpoint: Path,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    shown: Shown | None = None,
    layout: ParallelConfig | None = None,
) -> Iterator[dict[str, Any]]:
    """Answers to prompts, in their order; the model is loaded once. Arguments are those of `answer`.

    Raises:
        UserError: media of a prompt cannot be read; names its number.
    """
    model, builder, tokenizer = load(checkpoint, shown, layout)
    generator = Generator(model, tokenizer)

    def asked(numbers: range) -> Iterator[Asked]:
        for number in numbers:
            prompt = prompts[number]
            try:
                example = generator.seen.example(prompt, builder)
            except UserError as error:
                raise UserError(f"prompt {number + 1}: {error}" if len(prompts) > 1 else str(error)) from error
            line = {"key": f"prompt {number + 1}", "question": prompt.question, "reference": prompt.reference}
            yield line | {"remarks": remarks_on(example, builder.config, said=("truncated",))}, example, number

    yield from dealt(generator, asked, len(prompts), sampling or Sampling())


def answer_records(
    checkpoint: Path,
    shards: str,
    count: int,
    sampling: Sampling | None = None,
    shown: Shown | None = None,
    layout: ParallelConfig | None = None,
) -> Iterator[dict[str, Any]]:
    """Answers to the first turn of a data set's records, formatted as in training, but with fixed wording.

    Raises:
        DataError: no shards there. A record that cannot be used is left out and reported.
    """
    from molmo2_nemo.data.config import SourceConfig
    from molmo2_nemo.data.reader import ExampleReader, Skipped

    model, builder, tokenizer = load(checkpoint, shown, layout)
    config = dataclasses.replace(
        builder.config,
        sources={"records": SourceConfig(path=shards)},
        groups={},
        missing="error",
        progression=[],
        lengths=[],
    )
    reader = ExampleReader(config, builder, tokenizer.special.im_patch)

    def asked(numbers: range) -> Iterator[Asked]:
        for number in numbers:
            example = reader[number]
            if isinstance(example, Skipped):
                print(f"{example.key}: left out, {example.cause}: {example.detail}")
                continue
            if example.info.get("raw_text"):
                print(f"{example.key}: left out, raw text asks nothing")
                continue
            prompt, reference = first_turn(example)
            words = tokenizer.decode(prompt.input_ids[~prompt.visual].tolist(), skip_special=True).strip()
            users = (user for turns in example.info.get("conversations", []) for user, _ in turns)
            line = {
                "key": example.key,
                "question": next((user for user in users if user and user in words), words),
                "reference": tokenizer.decode(reference, skip_special=True).strip(),
                "remarks": remarks_on(example, builder.config),
            }
            yield line, prompt, number

    count = min(count, len(reader.datasets["records"]))
    yield from dealt(Generator(model, tokenizer), asked, count, sampling or Sampling())


def dealt(
    generator: Generator, asked: Callable[[range], Iterator[Asked]], count: int, sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """The answered lines of so many prompts, in order and on every rank; the data-parallel ranks share the work.

    Args:
        asked: numbers of prompts -> the prompts.

    Raises:
        UserError: from `asked`, after the answers to what came before.
    """
    own = place()
    if own.replicas == 1:
        yield from (line for line, _ in answers(generator, asked(range(count)), sampling))
        return
    together = TOGETHER[0] * own.replicas
    for start in range(0, count, together):
        mine = range(start + own.replica, min(start + together, count), own.replicas)
        found = gathered(list(answers(generator, asked(mine), sampling)))
        yield from (line for line, _ in sorted(found, key=lambda one: one[1]))


def answers(generator: Generator, asked: Iterator[Asked], sampling: Sampling) -> Iterator[tuple[dict[str, Any], int]]:
    """The lines asked, in order, with `answer` and its `tokens` added, and their numbers. Prompts are worked on
    together, as many as `TOGETHER` allows.

    Raises:
        UserError: from `asked`, after the answers to what came before.
    """
    waiting: list[Asked] = []
    failed: UserError | StopIteration | None = None
    while failed is None:
        try:
            waiting.append(next(asked))
        except (UserError, StopIteration) as error:
            failed = error
        size = sum({id(example.crops): example.crops.nbytes for _, example, _ in waiting}.values())
        if failed is None and size < TOGETHER[1] and len(waiting) < TOGETHER[0]:
            continue
        examples, numbers = [example for _, example, _ in waiting], [number for *_, number in waiting]
        done = generator.complete(examples, sampling, numbers)
        for (line, example, number), completion in zip(waiting, done, strict=True):
            cut = [f"the answer is cut off after {len(completion.tokens)} tokens"] if completion.ended == LENGTH else []
            cut += generator.beyond_range(example, completion)
            first = {"key": line["key"], "question": line["question"], "answer": completion.text.strip()}
            yield {**first, **line, "remarks": line["remarks"] + cut, "tokens": len(completion.tokens)}, number
        waiting = []
    if isinstance(failed, UserError):
        raise failed


def remarks_on(example: Example, config: DataConfig, said: Sequence[str] = ()) -> list[str]:
    """What was left out, cut off or replaced of an example's media, in words; `said`: kinds that were said before, with
    the files' names."""
    return [f"{n:,} {KINDS[kind].said(config)}" for kind, n in counted(example.info).items() if kind not in said]


def first_turn(example: Example) -> tuple[Example, list[int]]:
    """A training example up to its first answer, and the tokens of that answer, the end token included."""
    scored = example.loss_weights > 0
    start = int(scored.argmax())  # labels are shifted: this token is the last before the answer
    end = start + int((~scored[start:]).argmax()) if not scored[start:].all() else len(scored)
    same = [i for i in range(start, end) if example.branch_ids[i] in (example.branch_ids[start], ROOT_BRANCH)]
    cut = {
        name: getattr(example, name)[: start + 1]
        for name in ("input_ids", "labels", "loss_weights", "position_ids", "branch_ids", "visual")
    }
    return dataclasses.replace(example, **cut), example.labels[same].tolist()
