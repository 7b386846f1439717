"""What frameworks ask, as questions about pictures or a video. No framework is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError

KINDS = ("text", "image", "video")  # of parts


@dataclass(frozen=True)
class Asked:
    """One question, with what is shown beside it.

    Raises:
        UserError: images and a video.
    """

    question: str
    images: Sequence[Any] = ()  # PIL images, or paths or addresses of files
    video: bytes | str | Path | None = None  # a file's content or path; not beside images
    clip: tuple[float, float] | None = None  # seconds of the film: the part that is shown
    history: Sequence[tuple[str, str]] = ()  # earlier questions and answers

    def __post_init__(self) -> None:
        if self.images and self.video is not None:
            raise UserError("a question about images and a video; molmo2 is shown the one or the other")


def of_conversation(messages: Sequence[dict[str, Any]]) -> Asked:
    """lmms-eval's messages as one question: all pictures first, as in training; a system text opens the question.

    Raises:
        UserError: sound, several videos, images beside one, or turns that do not alternate.
    """
    parts = [part for message in messages for part in parts_of(message)]
    if any(part["type"] not in KINDS for part in parts):
        raise UserError("molmo2 sees pictures and videos and reads text; this task has other media")
    turns = [(message["role"], text_of(message)) for message in messages if message["role"] != "system"]
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise UserError(f"turns must alternate and end with the user's, got {', '.join(roles) or 'none'}")
    said = [text for _, text in turns]
    system = [text_of(message) for message in messages if message["role"] == "system"]
    said[0] = "\n".join(text for text in (*system, said[0]) if text)
    film = only([part for part in parts if part["type"] == "video"]) or {}
    start, end = film.get("start_time"), film.get("end_time")
    clip = None if start is None and end is None else (float(start or 0), float("inf") if end is None else end)
    images = [part["url"] for part in parts if part["type"] == "image"]
    return Asked(said[-1], images, film.get("url"), clip, tuple(zip(said[:-1:2], said[1::2], strict=True)))


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The content of one of lmms-eval's messages."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(message: dict[str, Any]) -> str:
    """The texts of one of lmms-eval's messages, a line each."""
    return "\n".join(part["text"] for part in parts_of(message) if part["type"] == "text" and part["text"])


def only(videos: Sequence[Any]) -> Any:
    """The one video, or None.

    Raises:
        UserError: there are several.
    """
    if len(videos) > 1:
        raise UserError(f"a question with {len(videos)} videos; molmo2 is shown one")
    return videos[0] if videos else None


def of_parts(message: Sequence[dict[str, Any]]) -> Asked:
    """VLMEvalKit's parts as one question: all pictures first, as in training.

    Raises:
        UserError: several videos, or images beside one.
    """
    said, images, videos = ([part["value"] for part in message if part["type"] == kind] for kind in KINDS)
    return Asked("\n".join(said), images, only(videos))


def of_turns(contents: Sequence[Sequence[dict[str, Any]]]) -> Asked:
    """VLMEvalKit's turns, user and assistant by turns, as the last question after the earlier ones.

    Raises:
        UserError: an even number of turns, several videos, or images beside one.
    """
    if len(contents) % 2 == 0:
        raise UserError(f"{len(contents)} turns; a conversation ends with the user's")
    turns = [of_parts(content) for content in contents]
    said = [turn.question for turn in turns]
    images = [image for turn in turns for image in turn.images]
    film = only([turn.video for turn in turns if turn.video is not None])
    return Asked(said[-1], images, film, None, tuple(zip(said[:-1:2], said[1::2], strict=True)))
