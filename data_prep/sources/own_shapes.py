"""Common shapes of instruction data, turned into this project's fields where only one reading is possible.

    "answer": 3                                               -> the text "3" (counted)
    "answer": ["a cat", "cat"]                                -> answers
    "image": ["a.jpg", "b.jpg"], "videos": ["c.mp4"]          -> images, video
    "messages": [{"role": "user", "content": "..."}, ...]     -> messages, a list of texts (OpenAI, Hugging Face)
    "conversations": [{"from": "human", "value": "..."}, ...] -> messages (LLaVA, ShareGPT); its `id` becomes the key
    {"type": "image_url", "image_url": {"url": "a.jpg"}}      -> a part of a message that names an image of the record

Marks of an image in the text (`<image>`, parts of type image) are dropped where they stand for all images of the record
at the start or the end of the first message, as Molmo2 reads images before all text; elsewhere they are refused.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from data_prep.sources.references import Inline
from molmo2_nemo.data.json_values import Fault, FieldError, is_number, show
from molmo2_nemo.data.meant import ANNOTATION_FIELDS, MARK
from molmo2_nemo.data.unread import HARMLESS

NUMBER_NOTE = "an answer that is a number, taken as text"
ROLES = {"user": 0, "human": 0, "assistant": 1, "gpt": 1, "model": 1}
SPEAKERS = (("role", "content"), ("from", "value"))  # what objects of messages call the speaker and the text
CHATS = ("messages", "conversations")
# Type of a part of a message -> the names that its medium may have in it.
PARTS = {
    **{kind: (kind, "image", "image_url", "url", "path") for kind in ("image", "image_url", "input_image")},
    **{kind: (kind, "video", "video_url", "url", "path") for kind in ("video", "video_url", "input_video")},
}
TEXT_PARTS = ("text", "input_text", "output_text")
UNREAD_IN_PARTS = (  # of OpenAI's images, and the sizes and rates of Qwen's media
    *("detail", "fps", "nframes", "min_frames", "max_frames"),
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
)
UNREAD_IN_MESSAGES = ("name",)  # of a speaker
NOT_TRAINED = ("system", "developer")
SLIP = 0.85  # likeness to a known name from which another one is taken for a mistake in writing
DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")


def not_read(name: str) -> str:
    """What the summary says of a field of another project's record that nothing reads."""
    return f"a field {name!r}, not read"


# --- answers ---------------------------------------------------------------------------------------------------------


def plain_answers(fields: dict[str, Any], notes: list[str], media: int = 0) -> dict[str, Any]:
    """An annotation, with its turns and alternatives, whose answers are texts: numbers and lists are converted.

    Args:
        media: images and videos of the record; marks for all of them around the first question are dropped.
    Raises:
        FieldError: another number of marks there, or messages that cannot be read.
    """
    made = dict(fields)
    for name in ("turns", "either"):
        if isinstance(made.get(name), list):
            media_of = [media if name == "either" or i == 0 else 0 for i in range(len(made[name]))]
            made[name] = [_below(e, notes, media_of[i], f"{name}[{i}]") for i, e in enumerate(made[name])]
    for name in ("question", "prompt"):
        if isinstance(made.get(name), str):
            made[name] = Chat(name, media).first(made[name], name)
    if isinstance(made.get("answer"), list) and "answers" not in made:
        made["answers"] = made.pop("answer")
    if "answer" in made:
        made["answer"] = _text(made["answer"], notes)
    if isinstance(made.get("answers"), list):
        made["answers"] = [_text(answer, notes) for answer in made["answers"]]
    if isinstance(made.get("messages"), list):
        chat = Chat("messages", media)
        made["messages"] = chat.texts(made["messages"])
        if chat.images or chat.videos:
            raise FieldError.wrong("messages", "texts: media are named by the record", chat.images or chat.videos)
        notes += [note for note in chat.notes if note not in notes]
    return made


def _below(entry: Any, notes: list[str], media: int, where: str) -> Any:
    """A turn or an alternative."""
    try:
        return plain_answers(entry, notes, media) if isinstance(entry, dict) else entry
    except FieldError as error:
        raise error.inside(where) from None


def _text(answer: Any, notes: list[str]) -> Any:
    if not is_number(answer):
        return answer
    if NUMBER_NOTE not in notes:
        notes.append(NUMBER_NOTE)
    return str(answer)


# --- whole lines -----------------------------------------------------------------------------------------------------


def plain_entry(entry: dict[str, Any], known: Collection[str], notes: list[str]) -> tuple[dict[str, Any], str]:
    """A line of another project's form as one of ours, and what it calls its messages.

    Of a line with `conversations` or with role-content messages, fields that are not `known` are left out, and noted.

    Raises:
        FieldError: more than one reading, or none.
    """
    made = _lists_of_media(entry)
    name = next((name for name in CHATS if name in made), "messages")
    if name == "messages" and not _has_objects(made.get(name)):
        return made, name
    if name == "messages" and "conversations" in made:
        raise FieldError.wrong("conversations", "in place of messages, not beside them", made["conversations"])
    if made.get("system"):
        raise FieldError.wrong("system", "left out: system messages cannot be trained", made["system"])
    if "id" in made:
        made.setdefault("key", str(made.pop("id")))
    ours = {name, *known, *(ANNOTATION_FIELDS - HARMLESS)}
    for other in [other for other in made if other not in ours]:
        if get_close_matches(other, known, n=1, cutoff=SLIP):
            raise FieldError.unknown(other, known, made[other])
        del made[other]
        notes.append(not_read(other))
    chat = Chat(name, media=_count(made))
    made["messages"] = chat.texts(made.pop(name))
    notes += chat.notes
    return made | chat.media_fields(made), name


def _has_objects(messages: Any) -> bool:
    return isinstance(messages, list) and any(isinstance(message, dict) for message in messages)


def _lists_of_media(entry: dict[str, Any]) -> dict[str, Any]:
    """`videos` as `video`, where there is one at most."""
    made = dict(entry)
    if "videos" in made:
        videos = made.pop("videos")
        if not isinstance(videos, list) or len(videos) > 1 or "video" in made:
            raise FieldError.wrong("videos", "a list of one path: a record has one video", videos)
        made |= {"video": videos[0]} if videos else {}
    return made


def _count(entry: dict[str, Any]) -> int:
    """How many images and videos an entry names."""
    named = [entry[name] for name in ("image", "images", "video") if name in entry]
    return sum(len(value) if isinstance(value, list) else 1 for value in named)


# --- messages --------------------------------------------------------------------------------------------------------


@dataclass
class Chat:
    """Reads messages as texts, user first.

    Args:
        name: the field that holds them, for errors.
        media: images and videos that the record names, which marks in the first message stand for.
    """

    name: str
    media: int
    images: list[Any] = field(default_factory=list)  # named by parts of the first message, in their order
    videos: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    indexed: int = 0  # parts so far that name an image by its number

    def texts(self, messages: Any) -> Any:
        """The texts, of a list of texts too.

        Raises:
            FieldError: an unknown role or part, two messages of one role in a row, a mark of an image inside the text.
        """
        if not _has_objects(messages):
            return self._plain(messages)
        return [self._message(message, i) for i, message in enumerate(messages)]

    def first(self, text: str, where: str) -> str:
        """The first message of a user without the marks of the record's media around it."""
        return self._content(text, where, first=True)

    def _plain(self, messages: Any) -> Any:
        if not isinstance(messages, list):
            return messages
        name = self.name
        return [
            self._content(m, f"{name}[{i}]", first=i == 0) if isinstance(m, str) else m for i, m in enumerate(messages)
        ]

    def media_fields(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The record's fields for media that parts of the messages name.

        Raises:
            FieldError: the record itself names media as well, or there are several videos.
        """
        if not self.images and not self.videos:
            return {}
        if self.media:
            name = next(name for name in ("image", "images", "video") if name in entry)
            raise FieldError.wrong(name, f"left out, as parts of {self.name} name the media", entry[name])
        if len(self.videos) > 1:
            raise FieldError.wrong(self.name, "messages that name one video: a record has one", self.videos)
        named: dict[str, Any] = {"images": self.images} if self.images else {}
        return named | ({"video": self.videos[0]} if self.videos else {})

    def _message(self, message: Any, i: int) -> str:
        where = f"{self.name}[{i}]"
        if isinstance(message, dict) and "role" in message:
            message = self._read(message, UNREAD_IN_MESSAGES)
        pair = next((pair for pair in SPEAKERS if isinstance(message, dict) and set(message) == set(pair)), None)
        if pair is None:
            raise FieldError.wrong(
                where, "an object with role and content (or from and value), and nothing else", message
            )
        role, content = pair
        speaker = ROLES.get(str(message[role]))
        if speaker is None:
            said = message[role]
            hint = f" ({said} messages cannot be trained; leave it out)" if said in NOT_TRAINED else ""
            raise FieldError.wrong(f"{where}.{role}", f"user or assistant{hint}", message[role])
        if speaker != i % 2:
            raise FieldError.wrong(f"{where}.{role}", "user and assistant in turn, user first", message[role])
        return self._content(message[content], f"{where}.{content}", first=i == 0)

    def _content(self, content: Any, where: str, *, first: bool) -> str:
        if isinstance(content, list):
            content = "".join(self._part(part, f"{where}[{i}]", first) for i, part in enumerate(content))
        if not isinstance(content, str):
            raise FieldError.wrong(where, "a text", content)
        marks = len(MARK.findall(content))
        if not marks:
            return content
        media = (len(self.images) + len(self.videos) or self.media) if first else 0
        text = re.sub(rf"^(?:\s*{MARK.pattern})+\s*|(?:\s*{MARK.pattern})+\s*$", "", content)
        if marks != media or MARK.search(text):
            expected = "no marks <image> or <video>, as media come before all text"
            if media:
                expected = (
                    f"marks for the record's {media} images at the start or the end of the first message, or none"
                )
            raise FieldError(
                Fault(where, f"{marks} marks <image>", expected), f"must hold {expected}; it holds {marks}"
            )
        return text

    def _part(self, part: Any, where: str, first: bool) -> str:
        if isinstance(part, str):
            return part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str) and set(part) == {"type", "text"}:
            return str(part["text"])
        if kind not in PARTS:
            raise FieldError.wrong(where, 'a {"type": "text", "text": ...} or a {"type": "image", "image": ...}', part)
        named = self._read({name: value for name, value in part.items() if name != "type"})
        if "index" in named:  # of one of the record's images
            if named.pop("index") != self.indexed:
                raise FieldError.wrong(f"{where}.index", f"{self.indexed}: images stand in their order", part["index"])
            self.indexed += 1
        if not named:
            return "<image>"
        medium = next(iter(named.values()))
        if isinstance(medium, dict):  # {"url": ..., "detail": ...}
            inner = self._read(medium)
            medium = inner.get("url") if set(inner) == {"url"} else None
        if len(named) > 1 or set(named) - set(PARTS[kind]) or not isinstance(medium, str):
            raise FieldError.wrong(where, f"{kind} and one of {', '.join(dict.fromkeys(PARTS[kind]))}", part)
        if not first:
            raise FieldError.wrong(
                where, "a text: Molmo2 reads media before all text, so the first message has them", part
            )
        (self.videos if "video" in kind else self.images).append(medium)
        return "<image>"

    def _read(self, fields: dict[str, Any], unread: Collection[str] = UNREAD_IN_PARTS) -> dict[str, Any]:
        """The fields of a part, or of a message, that are read; the others are noted."""
        for name in unread:
            if name in fields and not_read(name) not in self.notes:
                self.notes.append(not_read(name))
        return {name: value for name, value in fields.items() if name not in unread}


# --- images in the text of a field -----------------------------------------------------------------------------------


def inline_medium(value: str, where: str) -> Inline | None:
    """The medium that a `data:` address holds; None for other texts.

    Raises:
        FieldError: it cannot be decoded.
    """
    if not value.startswith("data:"):
        return None
    head = DATA_URL.match(value)
    try:
        return Inline(base64.b64decode(value[head.end() :], validate=True)) if head else _refuse(value, where)
    except binascii.Error:
        return _refuse(value, where)


def _refuse(value: str, where: str) -> Inline:
    expected = "data:image/png;base64, and the image in base64"
    raise FieldError(Fault(where, show(value), expected), f"must be {expected}, not {show(value)}")
