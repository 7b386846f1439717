"""Common shapes of instruction data, turned into this project's fields where only one reading is possible.

    "answer": 3                                               -> the text "3" (counted)
    "answer": ["a cat", "cat"]                                -> answers
    "messages": [{"role": "user", "content": "..."}, ...]     -> messages, a list of texts
    "conversations": [{"from": "human", "value": "..."}, ...] -> messages (LLaVA); its `id` becomes the key

Marks of the image in the text (`<image>`, parts of type image) are dropped where they stand for all images of the
record at the start or the end of the first message, as Molmo2 reads images before all text; elsewhere they are refused.
"""

from __future__ import annotations

import re
from typing import Any

from molmo2_nemo.data.json_values import Fault, FieldError, is_number

NUMBER_NOTE = "an answer that is a number, taken as text"
ROLES = {"user": 0, "human": 0, "assistant": 1, "gpt": 1, "model": 1}
MARK = re.compile(r"<(?:image|video)>")
PARTS = {"image", "image_url", "video", "video_url"}


def plain_answers(fields: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """An annotation, with its turns and alternatives, whose answers are texts: numbers and lists are converted."""
    made = dict(fields)
    for name in ("turns", "either"):
        if isinstance(made.get(name), list):
            made[name] = [plain_answers(e, notes) if isinstance(e, dict) else e for e in made[name]]
    if isinstance(made.get("answer"), list) and "answers" not in made:
        made["answers"] = made.pop("answer")
    if "answer" in made:
        made["answer"] = _text(made["answer"], notes)
    if isinstance(made.get("answers"), list):
        made["answers"] = [_text(answer, notes) for answer in made["answers"]]
    if isinstance(made.get("messages"), list) and any(isinstance(m, dict) for m in made["messages"]):
        made["messages"] = plain_messages(made["messages"], "messages", "role", "content", media=0)
    return made


def _text(answer: Any, notes: list[str]) -> Any:
    if not is_number(answer):
        return answer
    if NUMBER_NOTE not in notes:
        notes.append(NUMBER_NOTE)
    return str(answer)


def plain_messages(messages: Any, name: str, role: str, content: str, *, media: int) -> Any:
    """Messages as texts, user first; lists of texts are returned as they are.

    Args:
        name: the field that holds them, for errors.
        role, content: what their objects call the speaker and the text.
        media: images and videos of the record, which marks in the first message may stand for.
    Raises:
        FieldError: an unknown role, two messages of one role in a row, a mark of an image inside the text.
    """
    if not isinstance(messages, list) or not any(isinstance(message, dict) for message in messages):
        return messages
    texts = []
    for i, message in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(message, dict) or set(message) - {role, content}:
            raise FieldError.wrong(where, f"an object with {role} and {content}, and nothing else", message)
        speaker = ROLES.get(str(message.get(role)))
        if speaker is None:
            hint = "system messages cannot be trained; leave it out" if message.get(role) == "system" else ""
            raise FieldError.wrong(
                f"{where}.{role}", f"user or assistant{f' ({hint})' if hint else ''}", message.get(role)
            )
        if speaker != i % 2:
            raise FieldError.wrong(f"{where}.{role}", "user and assistant in turn, user first", message[role])
        texts.append(_content(message.get(content), f"{where}.{content}", media if i == 0 else 0))
    return texts


def _content(content: Any, where: str, media: int) -> str:
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise FieldError.wrong(where, "a text", content)
    marks = len(MARK.findall(content))
    if not marks:
        return content
    text = re.sub(rf"^(?:\s*{MARK.pattern})+\s*|(?:\s*{MARK.pattern})+\s*$", "", content)
    if marks != media or MARK.search(text):
        expected = f"marks for the record's {media} images at the start or the end of the first message, or none"
        raise FieldError(Fault(where, f"{marks} marks <image>", expected), f"must hold {expected}; it holds {marks}")
    return text


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in PARTS and set(part) == {"type"}:
        return "<image>"
    raise FieldError.wrong(where, 'a {"type": "text", "text": ...} or a {"type": "image"} without a path', part)
