"""A file of prompts for `molmo2 generate`: one JSON object a line, its media beside the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from molmo2_nemo.data.json_values import is_number
from molmo2_nemo.data.media import read_media
from molmo2_nemo.data.styles import asked_style
from molmo2_nemo.data.subtitle_files import READERS, read_subtitles
from molmo2_nemo.errors import UserError, read_text
from molmo2_nemo.inference.prompt import Prompt

KEYS = ("question", "image", "video", "subtitles", "clip", "options", "style", "answer")  # of a prompt


def read_prompts(path: Path, cut: list[Path] | None = None) -> list[Prompt]:
    """Prompts with the bytes of their media.

    Args:
        cut: gets the paths of images that are cut off or damaged inside.
    Raises:
        UserError: no such file, or a line that is not a prompt; names the line.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file of prompts' if path.is_dir() else 'no such file'}")
    prompts = []
    for number, text in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            prompt = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(prompt, dict) or not isinstance(prompt.get("question"), str):
            raise UserError(f'{where}: a prompt is an object with a text "question"')
        if unknown := sorted(set(prompt) - set(KEYS)):
            raise UserError(f"{where}: unknown key {unknown[0]!r}; a prompt has {', '.join(KEYS)}")
        try:
            prompts.append(_prompt(prompt, path.parent, cut))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not prompts:
        raise UserError(f"{path}: no prompt in it")
    return prompts


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
    if not all(isinstance(text, str) for text in (answer if isinstance(answer, list) else [answer])):
        raise UserError(f"answer is {answer!r}; expected a text or a list of texts")
    for key in ("subtitles", "clip"):
        if key in given and "video" not in given:
            raise UserError(f"{key} without a video")
    options = given.get("options", [])
    if not isinstance(options, list) or not all(isinstance(text, str) and text.strip() for text in options):
        raise UserError(f"options is {options!r}; expected a list of texts")
    return Prompt(
        given["question"],
        images=[_media(folder, "image", name, cut) for name in names],
        video=_media(folder, "video", given["video"], cut) if "video" in given else None,
        style=asked_style(given.get("style", "user_qa")),
        subtitles=_subtitles(folder, given["subtitles"]) if "subtitles" in given else (),
        clip=read_clip(given["clip"]) if "clip" in given else None,
        options=options,
        reference=given.get("answer"),
    )


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


def _media(folder: Path, key: str, name: Any, cut: list[Path] | None) -> bytes:
    if not isinstance(name, str) or not name:
        raise UserError(f"{key} is {name!r}; expected the path of a file")
    return read_media(folder / name, key, cut)
