"""The wording of multiple choice: a question and its options in one of many layouts, and the answer in that layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from molmo2_nemo.errors import DataError

STANDARD_INSTRUCTION = "Only return the correct answer option."
P_STANDARD, P_LABEL_ONLY, P_LABELLED, P_INLINE, P_INSTRUCTION, P_COMMON, P_BULLET = 0.1, 0.25, 0.8, 0.1, 0.5, 0.8, 0.5

COMMON_MARKERS = ("{}. ", "{}) ", "{}: ", "({}) ")
OTHER_MARKERS = ("[{}] ", "{} - ", "{} = ", "<{}> ", "{}| ", "{}.) ", "option {}: ", "{} -> ", "#{} ", "*{}* ")
BULLETS = ("- ", "* ", "+ ", "> ", "~ ")
NAME_WORDS = ("letter", "letter", "number", "numeral")  # the word for each kind of label in NAMES


def _roman(number: int) -> str:
    digits = ((10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i"))
    text = ""
    for value, letters in digits:
        while number >= value:
            text, number = text + letters, number - value
    return text


NAMES: tuple[tuple[str, ...], ...] = (
    tuple(chr(ord("A") + i) for i in range(26)),
    tuple(chr(ord("a") + i) for i in range(26)),
    tuple(str(i) for i in range(1, 21)),
    tuple(_roman(i) for i in range(1, 11)),
)

# {q} question, {o} options, {i} instruction
LAYOUTS = (
    "{q}\n{o}\n{i}",
    "{q}\n{i}\n{o}",
    "{i}\n{q}\n{o}",
    "{i}\n\n{q}\n\n{o}",
    "{q}\n\n{o}\n\n{i}",
    "Question: {q}\n{o}\n{i}",
    "Question: {q}\nOptions:\n{o}\n{i}",
    "{i}\nQuestion: {q}\nOptions:\n{o}",
    "{i}\nQ: {q}\nChoices:\n{o}",
    "Q: {q}\n{o}\n{i}",
    "{q} {i}\n{o}",
    "{i} {q}\n{o}",
    "Options:\n{o}\n{q} {i}",
    "Here are some choices:\n{o}\n\n{i}\n{q}",
    "{q}\nPossible answers:\n{o}\n{i}",
)
DIRECT_LAYOUTS = (
    "{q}\n{o}",
    "{q}\n\n{o}",
    "Question: {q}\n{o}",
    "Question: {q}\nOptions:\n{o}",
    "Q: {q}\nChoices:\n{o}",
    "{q}\nOptions:\n{o}",
    "{q}\nChoices:\n{o}",
    "{q}\nPossible answers:\n{o}",
    "Options:\n{o}\nQuestion: {q}",
)
# {n} is the word for an option's label
LABEL_INSTRUCTIONS = (
    "Answer with the {n} of the correct option only.",
    "Reply with just the {n} of the right choice.",
    "Give only the {n}.",
    "Which one is right? Return its {n}.",
    "Pick an option and state its {n}, nothing else.",
    "Respond with the {n} of your choice.",
    "Write the {n} of the best answer.",
    "Only the {n} of the answer, please.",
    "Select one option; output its {n}.",
    "Your answer should be a single {n}.",
    "Tell me the {n} of the option that fits.",
    "Choose the best option and answer with its {n}.",
    "The answer must be one of the {n}s above or below.",
    "Identify the correct option by its {n}.",
)
FULL_INSTRUCTIONS = (
    "Answer with one of the options.",
    "Choose the correct option.",
    "Pick the best answer.",
    "Select the right answer from the list.",
    "Which of these is correct?",
    "Reply with the correct option.",
    "Give the option that answers the question.",
    "Decide which option is right.",
    "Return the best choice.",
    "Only one option is right; which one?",
    "Please select the answer that fits best.",
    "Repeat the correct option as your answer.",
    "Say which of the choices is true.",
    "Write out the correct choice.",
    "Use the options given to answer.",
)


def _pick(rng: np.random.Generator, items: Sequence) -> object:
    return items[int(rng.integers(len(items)))]


def check_choice(options: Sequence[str], answer: int | None) -> None:
    if not options or len(options) > len(NAMES[0]):
        raise DataError(f"multiple choice needs 1 to {len(NAMES[0])} options, got {len(options)}")
    if answer is not None and not 0 <= answer < len(options):
        raise DataError(f"answer_idx {answer} is outside 0..{len(options) - 1}")


def plain_choice(question: str, options: Sequence[str], answer: int | None) -> tuple[str, str]:
    """The layout of stage 1: question, lettered options, a final newline."""
    check_choice(options, answer)
    lines = [f"{name}. {option}" for name, option in zip(NAMES[0], options, strict=False)]
    return "\n".join([question, *lines]) + "\n", "" if answer is None else lines[answer]


def standard_choice(
    question: str, options: Sequence[str], answer: int | None, *, unlabelled: bool = False
) -> tuple[str, str]:
    """The layout of evaluation: question, instruction, lettered options; the answer repeats the option's line."""
    check_choice(options, answer)
    lines = list(options)
    if not unlabelled:
        lines = [f"{name}. {option}" for name, option in zip(NAMES[0], options, strict=False)]
    return "\n".join([question, STANDARD_INSTRUCTION, *lines]), "" if answer is None else lines[answer]


class Layout(NamedTuple):
    """How a question is laid out for training."""

    label_only: bool  # the answer is the option's name alone
    labelled: bool  # options have names before them
    inline: bool  # options stand in one line
    instruct: bool  # a sentence says how to answer


def draw_layout(options: Sequence[str], answer: int, rng: np.random.Generator) -> Layout | None:
    """A drawn layout; None: that of `standard_choice`, with probability 0.1."""
    if rng.random() < P_STANDARD:
        return None
    label_only = bool(rng.random() < P_LABEL_ONLY)
    labelled = bool(rng.random() < P_LABELLED) or label_only or not options[answer].strip()
    return Layout(label_only, labelled, bool(rng.random() < P_INLINE), bool(rng.random() < P_INSTRUCTION))


def random_choice(
    question: str, options: Sequence[str], answer: int, rng: np.random.Generator, *, unlabelled: bool = False
) -> tuple[str, str]:
    """A layout for training: `standard_choice` with probability 0.1, else drawn from this module's lists."""
    check_choice(options, answer)
    layout = draw_layout(options, answer, rng)
    if layout is None:
        return standard_choice(question, options, answer, unlabelled=unlabelled)
    label_only, labelled, inline, instruct = layout
    mark, name_of, word = _naming(options, labelled, rng)
    lines = [mark(i) + option for i, option in enumerate(options)]
    body = str(" " + str(_pick(rng, ("; ", " ||| ", " "))).join(lines)) if inline else "\n".join(lines)
    reply = name_of(answer) if label_only else lines[answer] if labelled else options[answer]
    if not instruct and not label_only:
        return _fill(str(_pick(rng, DIRECT_LAYOUTS)), question, body, "", inline), reply
    sentence = str(_pick(rng, LABEL_INSTRUCTIONS if label_only else FULL_INSTRUCTIONS)).replace("{n}", word)
    return _fill(str(_pick(rng, LAYOUTS)), question, body, sentence, inline), reply


def _naming(
    options: Sequence[str], labelled: bool, rng: np.random.Generator
) -> tuple[Callable[[int], str], Callable[[int], str], str]:
    """For each option: what precedes it, its bare label, and the word for such a label."""
    if not labelled:
        bullet = str(_pick(rng, BULLETS)) if rng.random() < P_BULLET else ""
        return lambda i: bullet, lambda i: "", ""
    marker = str(_pick(rng, COMMON_MARKERS if rng.random() < P_COMMON else OTHER_MARKERS))
    families = [f for f in range(len(NAMES)) if len(NAMES[f]) >= len(options)]
    family = families[int(rng.integers(len(families)))]
    draw = rng.random()
    word = NAME_WORDS[family] if draw < 0.6 else "identifier" if draw < 0.8 else "label"
    return lambda i: marker.format(NAMES[family][i]), lambda i: NAMES[family][i], word


def _fill(layout: str, question: str, body: str, instruction: str, inline: bool) -> str:
    """Put the parts into a layout without reading braces in them; inline options follow on the same line."""
    if inline:
        layout = layout.replace("\n{o}", "{o}")
        body = body if layout.find("{o}") > 0 else body.lstrip()
    parts = {"{q}": question, "{o}": body, "{i}": instruction}
    out, rest = [], layout
    while rest:
        hits = [(rest.find(mark), mark) for mark in parts if mark in rest]
        if not hits:
            out.append(rest)
            break
        at, mark = min(hits)
        out += [rest[:at], parts[mark]]
        rest = rest[at + len(mark) :]
    return "".join(out)
