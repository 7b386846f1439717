"""A file of prompts for `molmo2 generate`: one JSON object a line, its media beside the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.data.json_values import is_number
from molmo2_nemo.data.media import read_media
from molmo2_nemo.data.styles import asked_style
from molmo2_nemo.data.subtitle_files import READERS, read_subtitles
from molmo2_nemo.errors import UserError, read_text
from molmo2_nemo.evaluation.scorers.multiple_choice import option as named_option
from molmo2_nemo.evaluation.text import normalised
from molmo2_nemo.inference.prompt import Prompt, Shown

KEYS = ("question", "image", "video", "subtitles", "clip", "options", "style", "answer")  # of a prompt
LISTED = 5  # faults


def read_prompts(path: Path, cut: list[Path] | None = None) -> list[Prompt]:
    """Prompts with the bytes of their media.

    Args:
        cut: gets the paths of images that are cut off or damaged inside.
    Raises:
        UserError: no such file, or lines that are no prompts; names the first of them, with what is wrong, and how many
            there are.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file of prompts' if path.is_dir() else 'no such file'}")
    prompts, faults = [], []
    for number, text in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            prompts.append(_prompt(_entry(text), path.parent, cut))
        except UserError as error:
            faults.append(f"{path}, line {number}: {error}")
    refuse(faults, "prompts cannot be used")
    if not prompts:
        raise UserError(f"{path}: no prompt in it")
    return prompts


def refuse(faults: Sequence[str], what: str) -> None:
    """Raises UserError with the first faults and their number; nothing where there are none.

    Args:
        what: has these faults, such as "prompts cannot be used".
    """
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        more = [f"and {len(faults) - LISTED:,} more"] if len(faults) > LISTED else []
        raise UserError("\n  - ".join([f"{len(faults):,} {what}:", *faults[:LISTED], *more]))


def _entry(text: str) -> dict[str, Any]:
    """The object of a line.

    Raises:
        UserError: not one with a question and known keys.
    """
    try:
        entry = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = str(error)
        if isinstance(error, json.JSONDecodeError):
            where = f"{error.msg.removesuffix(' at')}, column {error.colno}"
        raise UserError(f"not JSON ({where})") from None
    if not isinstance(entry, dict) or entry.get("question") is None:
        raise UserError('a prompt is an object with a text "question"')
    if not isinstance(entry["question"], str):
        raise UserError(f"question is {entry['question']!r:.80}; expected a text")
    if unknown := sorted(set(entry) - set(KEYS)):
        raise UserError(f"unknown key {unknown[0]!r}; a prompt has {', '.join(KEYS)}")
    check_question(entry["question"])
    return entry


def check_question(question: str) -> None:
    """Raises UserError: a question without a word."""
    if not question.strip():
        raise UserError("the question is blank; expected a text")


def _prompt(entry: dict[str, Any], folder: Path, cut: list[Path] | None) -> Prompt:
    """One line, read: a key that is null counts as left out; media lie relative to `folder`.

    Raises:
        UserError: what is wrong with the line; the caller adds which line it is.
    """
    given = {name: value for name, value in entry.items() if value is not None}
    images = given.get("image", [])
    names = images if isinstance(images, list) else [images]
    if names and "video" in given:
        raise UserError("image and video: a prompt has images or one video, not both")
    answer = given.get("answer", "")
    if not all(isinstance(one, str | dict) for one in (answer if isinstance(answer, list) else [answer])):
        raise UserError(f"answer is {answer!r}; expected a text, an object that a scorer reads, or a list of them")
    for key in ("subtitles", "clip"):
        if key in given and "video" not in given:
            raise UserError(f"{key} without a video")
    options = given.get("options", [])
    if not isinstance(options, list) or not all(isinstance(text, str) and text.strip() for text in options):
        raise UserError(f"options is {options!r}; expected a list of texts")
    if options:
        answers = answer if isinstance(answer, list) else [answer]
        _check_options(options, [text for text in answers if isinstance(text, str)])
    clip = read_clip(given["clip"]) if "clip" in given else None
    return Prompt(
        given["question"],
        images=[_media(folder, "image", name, cut) for name in names],
        video=_media(folder, "video", given["video"], cut, clip) if "video" in given else None,
        style=asked_style(given.get("style", "user_qa")),
        subtitles=_subtitles(folder, given["subtitles"]) if "subtitles" in given else (),
        clip=clip,
        options=options,
        reference=given.get("answer"),
    )


def _check_options(options: list[str], answers: list[str]) -> None:
    """Raises UserError: an option that stands twice, or an answer that is none of the options, by letter or text."""
    twice = next((option for i, option in enumerate(options) if option in options[:i]), None)
    if twice is not None:
        raise UserError(f"options has {twice!r} twice")
    for answer in answers:
        if answer.strip() and not any(_names(answer, number, option) for number, option in enumerate(options)):
            raise UserError(f"answer is {answer!r}, which is none of the options {options!r}")


def _names(answer: str, number: int, option: str) -> bool:
    """Whether an answer names an option by its text, its letter, or both."""
    letter, text = named_option(answer)
    alike = text.strip() == option.strip() or normalised(text) == normalised(option) != ""
    if letter is None:
        return alike
    return answer.strip() == option.strip() or (letter == chr(ord("A") + number) and (alike or not text))


def without_effect(shown: Shown, prompts: Sequence[Prompt]) -> list[str]:
    """What to say of options that replace settings of media that no prompt has, a line each."""
    films, images = any(prompt.video is not None for prompt in prompts), any(prompt.images for prompt in prompts)
    given = {
        "--frames": (shown.frames, films, "video"),
        "--fps": (shown.fps, films, "video"),
        "--max-crops": (shown.max_crops, images, "image"),
        "--high-res": (shown.high_res or None, images, "image"),
    }
    return [
        f"{option} has no effect: there is no {kind}"
        for option, (value, has, kind) in given.items()
        if value is not None and not has
    ]


def read_clip(value: Any) -> tuple[float, float]:
    """A part of a film, [start, end] in seconds.

    Raises:
        UserError: something else.
    """
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(is_number(v) for v in value)):
        raise UserError(f"clip is {value!r}; expected [start, end] in seconds")
    start, end = map(float, value)
    if not 0 <= start < end:
        raise UserError(f"clip is [{start:g}, {end:g}]; expected 0 <= start < end, in seconds")
    return start, end


def _subtitles(folder: Path, value: Any) -> list[tuple[float, float, str]]:
    if not isinstance(value, str) or not value:
        raise UserError(f"subtitles is {value!r}; expected the path of a file: {', '.join(READERS)}")
    return read_subtitles(folder / value)


def _media(folder: Path, key: str, name: Any, cut: list[Path] | None, clip: tuple[float, float] | None = None) -> bytes:
    if not isinstance(name, str) or not name:
        raise UserError(f"{key} is {name!r}; expected the path of a file")
    return read_media(folder / name, key, cut, clip)
