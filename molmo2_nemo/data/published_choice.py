"""Multiple choice laid out as the published code does it (`template_mc_question`), with imported wordings.

multiple_choice.py has this project's own layouts and the fixed one of evaluation; the probabilities are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo2_nemo.data.multiple_choice import (
    P_BULLET,
    P_COMMON,
    check_choice,
    draw_layout,
    standard_choice,
)
from molmo2_nemo.data.wordings import ChoiceWords
from molmo2_nemo.errors import DataError

P_OWN_WORD, P_IDENTIFIER = 0.6, 0.2  # chances that a name is called a letter (or number), or an identifier


@dataclass(frozen=True)
class _Options:
    """Options as lines, with what precedes each."""

    lines: list[str]
    names: Sequence[str]  # empty where options have none
    word: str  # for a name
    marker: str


def published_choice(
    question: str,
    options: Sequence[str],
    answer: int,
    rng: np.random.Generator,
    words: ChoiceWords,
    *,
    unlabelled: bool = False,
) -> tuple[str, str]:
    """The user message and the answer: `standard_choice` with probability 0.1, else a drawn layout.

    Unlike the published code, names are drawn from the kinds that have enough of them for all options.
    """
    check_choice(options, answer)
    layout = draw_layout(options, answer, rng)
    if layout is None:
        return standard_choice(question, options, answer, unlabelled=unlabelled)
    name_only, named, inline, instructed = layout
    shown = _named(options, words, rng) if named else _Options(list(options), (), "", "")
    body = _body(shown, options, words, inline, rng)
    reply = shown.names[answer] if name_only else shown.lines[answer]
    parts = {"question": question, "options": body, "name": shown.word}
    if instructed:
        texts = words.name_instructions if name_only else words.instructions
        texts = texts if name_only or not named else (*texts, *words.named_instructions)
        parts["instruction"] = _filled(_drawn(rng, texts), {"name": shown.word})
        return _filled(_drawn(rng, words.layouts), parts), reply
    return _filled(_drawn(rng, words.name_layouts if name_only else words.plain_layouts), parts), reply


def _named(options: Sequence[str], words: ChoiceWords, rng: np.random.Generator) -> _Options:
    """Options with names before them."""
    marker = _drawn(rng, words.common_markers if rng.random() < P_COMMON else words.other_markers)
    kinds = [i for i, names in enumerate(words.names) if len(names) >= len(options)]
    if not kinds:
        raise DataError(f"{len(options)} options, but the imported wordings have no kind of names for so many")
    kind = kinds[int(rng.integers(len(kinds)))]
    names = words.names[kind]
    draw = rng.random()
    word = words.name_words[kind] if draw < P_OWN_WORD else "label"
    if P_OWN_WORD <= draw < P_OWN_WORD + P_IDENTIFIER:
        word = "identifier"
    lines = [marker.replace("{name}", name) + option for name, option in zip(names, options, strict=False)]
    return _Options(lines, names, word, marker)


def _body(shown: _Options, options: Sequence[str], words: ChoiceWords, inline: bool, rng: np.random.Generator) -> str:
    """The options in one text: on one line, if a separator stands out from them, or one line each."""
    bare = shown.marker.replace("{name}", "%s").strip()
    ends = [s for s in words.separators if s not in bare and not any(option.endswith(s) for option in options)]
    if shown.names:
        ends.append("")
    if inline and ends:
        end = _drawn(rng, ends)
        *before, last = shown.lines
        return " ".join([*(line if line.endswith(end) else line + end for line in before), last])
    if not shown.names and rng.random() < P_BULLET:
        bullet = _drawn(rng, words.bullets)
        return "\n".join(f"{bullet} {line}" for line in shown.lines)
    return "\n".join(shown.lines)


def _drawn(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _filled(layout: str, parts: dict[str, str]) -> str:
    """The layout with its fields filled in; braces inside the parts are left alone."""
    pieces = layout.split("{")
    out = pieces[0]
    for piece in pieces[1:]:
        name, brace, rest = piece.partition("}")
        out += parts[name] + rest if brace and name in parts else "{" + piece
    return out
