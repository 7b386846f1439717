"""Records of tars that another tool wrote: where their texts lie, and the record that follows from that.

Image-text tars (img2dataset's and many others') hold `KEY.jpg`, `KEY.txt` and a `KEY.json` of their own kind. The tars
stay as they are; the manifest's head keeps the mapping, and a record's JSON is made from it whenever it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from molmo2_nemo.data.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadRecord, load_json
from molmo2_nemo.errors import UserError

TEXTS = ("caption", "question", "answer")
PLACE = re.compile(r"[a-z0-9_.]+(:.+)?")


@dataclass(frozen=True)
class ForeignTexts:
    """Where a record's texts lie: the suffix of a text member (`txt`), or a field of a JSON member (`json:caption`,
    `json:meta.caption` inside an object).

    Raises:
        UserError: nothing is named, only one of question and answer, or something that is no place.
    """

    caption: str | None = None
    question: str | None = None
    answer: str | None = None
    style: str | None = None  # of captions; None: long_caption or video_long_caption
    media: tuple[str, ...] = ()  # suffixes of the images or the video, in this order; (): all there are

    def __post_init__(self) -> None:
        if self.caption is None and self.question is None and self.answer is None:
            raise UserError("nothing to train on: give --caption-from, or --question-from and --answer-from")
        if (self.question is None) != (self.answer is None):
            raise UserError("--question-from and --answer-from belong together")
        for name in TEXTS:
            place = getattr(self, name)
            if place is not None and not PLACE.fullmatch(place):
                raise UserError(
                    f"--{name}-from {place}: expected a member's suffix (txt) or a JSON field (json:caption)"
                )
        object.__setattr__(self, "media", tuple(suffix.lower().lstrip(".") for suffix in self.media))

    def head(self) -> dict[str, Any]:
        """JSON values for the manifest's head; `ForeignTexts(**values)` is this one again."""
        return {name: value for name, value in asdict(self).items() if value}

    def members(self, label: str, members: Mapping[str, bytes]) -> dict[str, bytes]:
        """The members of a record (suffix -> bytes) with this project's JSON in place of their own.

        Raises:
            BadRecord: a text or the media are not there; names the place.
        """
        images, video = self._media(label, members)
        texts = {name: _text(label, members, place) for name in TEXTS if (place := getattr(self, name)) is not None}
        annotations = []
        if self.caption is not None:
            style = self.style or ("video_long_caption" if video else "long_caption")
            annotations.append({"style": style, "text": texts["caption"]})
        if self.question is not None:
            annotations.append({"style": "user_qa", "question": texts["question"], "answer": texts["answer"]})
        data = {"annotations": annotations, **({"video": video} if video else {"images": images})}
        return {**members, "json": json.dumps(data).encode()}

    def _media(self, label: str, members: Mapping[str, bytes]) -> tuple[list[str], str | None]:
        wanted = self.media or sorted(members, key=_natural)
        gone = [suffix for suffix in self.media if suffix not in members]
        videos = [suffix for suffix in wanted if _kind(suffix) in VIDEO_SUFFIXES - IMAGE_SUFFIXES]
        images = [suffix for suffix in wanted if _kind(suffix) in IMAGE_SUFFIXES]
        seen = ", ".join(f".{suffix}" for suffix in sorted(members)[:8])
        if gone or not (images or videos):
            what = f"no .{gone[0]} member" if gone else "no image or video"
            raise BadRecord(label, "missing member", f"has {what} (it holds {seen})")
        if len(videos) > 1 or (videos and images):
            raise BadRecord(
                label, "bad record", f"has more than images or one video ({seen}); choose with --media-from"
            )
        return images, videos[0] if videos else None


def _kind(suffix: str) -> str:
    return suffix.rsplit(".", 1)[-1]


def _natural(suffix: str) -> list[Any]:
    """Sorts 2.jpg before 10.jpg."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", suffix)]


def _text(label: str, members: Mapping[str, bytes], place: str) -> str:
    suffix, _, path = place.partition(":")
    if suffix not in members:
        seen = ", ".join(f".{s}" for s in sorted(members)[:8])
        raise BadRecord(label, "missing member", f"has no .{suffix} member (it holds {seen})")
    value: Any
    if path:
        value = load_json(label, {"json": members[suffix]})
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    else:
        try:
            value = members[suffix].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(label, "bad record", f".{suffix} is not UTF-8 (byte {error.start})") from None
    if not isinstance(value, str) or not value.strip():
        shown = "missing" if value is None else "empty" if isinstance(value, str) else f"{value!r:.80}, not a text"
        raise BadRecord(label, "bad record", f"its text at {place} is {shown}")
    return value.strip()
