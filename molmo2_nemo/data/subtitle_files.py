"""Subtitle files: SubRip (.srt), WebVTT (.vtt), SubStation Alpha (.ass, .ssa), lists (.json) -> lines with times.

Formatting is dropped: tags (`<i>`, `<v Name>`, `{\\an8}`), positions, styles, and drawings of ASS. Line breaks inside a
line of subtitles stay. Formats: https://www.w3.org/TR/webvtt1/, and what ffmpeg's demuxers take for the other two.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from molmo2_nemo.errors import DataError, UserError

Line = tuple[float, float, str]  # start and end in seconds, text
TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?"
TIMING = re.compile(rf"^\s*{TIME}\s*-->\s*{TIME}(?:\s.*)?$")
CLOCK = re.compile(rf"^{TIME}$")
STAMP = r"(?:\d+:)?\d{1,2}:\d{1,2}"
FRACTION = rf"{STAMP}[.,]\d{{1,3}}"
# Times with something else than an arrow between them; "10:30 - 11:00" may be words.
SLIP = re.compile(
    rf"^\s*(?:{FRACTION}[^\w:]+{FRACTION}|\d+:{STAMP}[^\w:]+\d+:{STAMP}|{STAMP}\s*[-–—=]*>+\s*{STAMP})(?:\s.*)?$"
)
TAG = re.compile(r"</?[a-zA-Z][^<>\n]*>|<\d[\d:.]*>|\{\\[^{}]*\}")  # <i>, <00:01.500>, {\an8}
OVERRIDE = re.compile(r"\{[^{}]*\}")
DRAWING = re.compile(r"\{[^{}]*\\p[1-9][^{}]*\}")
JSON_LINE = '{"start": "00:00:01.500", "end": "00:00:03.000", "line": "words"}'
HEADERS = ("NOTE", "STYLE", "REGION")  # blocks of WebVTT that are no subtitles


def parse(name: str, content: bytes) -> list[Line]:
    """The lines of a subtitle file, in its order; those without text are left out.

    Args:
        name: of the file; its ending says which kind it is.
    Raises:
        DataError: another kind, no text, times that cannot be read (with the line's number), or no line at all.
    """
    reader = READERS.get(PurePosixPath(name).suffix.lower())
    if reader is None:
        raise DataError(f"subtitles are read from {', '.join(READERS)} files")
    found = list(reader(_text(content)))
    if not found:
        raise DataError("holds no subtitles")
    return [line for line in found if line[2]]


def read_subtitles(path: Path) -> list[Line]:
    """The lines of a subtitle file that a user names.

    Raises:
        UserError: no such file, or one that `parse` refuses; names it.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        return parse(path.name, path.read_bytes())
    except DataError as error:
        raise UserError(f"{path}: {error}") from None


def _text(content: bytes) -> list[str]:
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte {error.start}); convert it: iconv -f LATIN1 -t UTF-8") from None
    return re.split(r"\r\n|\n|\r", text)


def _seconds(groups: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, fraction = groups
    return round(int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0) + float(f"0.{fraction or 0}"), 3)


def _times(line: str, number: int) -> tuple[float, float]:
    match = TIMING.match(line)
    if match is None:
        raise DataError(f"line {number}: 00:00:01,000 --> 00:00:02,500 was expected, not {line.strip()[:60]!r}")
    return _in_order(_seconds(match.groups()[:4]), _seconds(match.groups()[4:]), number)


def _in_order(start: float, end: float, number: int) -> tuple[float, float]:
    if end < start:
        raise DataError(f"line {number}: ends at {end:g} s, before its start at {start:g} s")
    return start, end


def _plain(lines: list[str]) -> str:
    return "\n".join(TAG.sub("", line).strip() for line in lines).strip()


def _srt(lines: list[str]) -> Iterator[Line]:
    """A text goes on to the number before the next times, so that it may hold empty lines."""
    starts = [i for i, line in enumerate(lines) if "-->" in line or SLIP.match(line)]
    for start, end in zip(starts, [*starts, len(lines) + 1][1:], strict=True):
        begins, ends = _times(lines[start], start + 1)
        body = lines[start + 1 : end]
        if end <= len(lines):
            while body and not body[-1].strip():
                body.pop()
            if body and body[-1].strip().isdigit():
                body.pop()
        yield begins, ends, _plain(body)


def _vtt(lines: list[str]) -> Iterator[Line]:
    """Blocks apart by empty lines; a block without times is a comment, a style, or the header."""
    if not lines[0].startswith("WEBVTT"):
        raise DataError("line 1: WEBVTT was expected")
    i = 0
    while i < len(lines):
        end = next((j for j in range(i, len(lines)) if not lines[j].strip()), len(lines))
        timing = next((j for j in range(i, end) if "-->" in lines[j] or SLIP.match(lines[j])), None)
        if timing is not None and lines[i].split(" ")[0] not in HEADERS:
            begins, ends = _times(lines[timing], timing + 1)
            yield begins, ends, html.unescape(_plain(lines[timing + 1 : end])).replace("\xa0", " ")
        i = end + 1


def _ass(lines: list[str]) -> Iterator[Line]:
    """The `Dialogue:` lines of [Events]; the `Format:` line before them names their fields, of which Text is last."""
    section, names = "", []
    for number, line in enumerate(lines, 1):
        kind, _, rest = line.partition(":")
        if line.startswith("["):
            section = line.strip().lower()
        elif section == "[events]" and kind == "Format":
            names = [name.strip() for name in rest.split(",")]
        elif section == "[events]" and kind == "Dialogue":
            if not {"Start", "End"} <= set(names) or names[-1] != "Text":
                raise DataError(f"line {number}: no Format line with Start, End and, last, Text before it")
            fields = dict(zip(names, rest.split(",", len(names) - 1), strict=False))
            clocks = [CLOCK.match(fields.get(name, "").strip()) for name in ("Start", "End")]
            if clocks[0] is None or clocks[1] is None or "Text" not in fields:
                raise DataError(f"line {number}: times as 0:00:01.50 were expected, not {rest.strip()[:60]!r}")
            times = _in_order(_seconds(clocks[0].groups()), _seconds(clocks[1].groups()), number)
            yield *times, _dialogue(fields["Text"])


def _dialogue(text: str) -> str:
    text = OVERRIDE.sub("", DRAWING.split(text)[0])
    return "\n".join(part.strip() for part in re.split(r"\\N|\\n", text.replace("\\h", " "))).strip()


def _json(lines: list[str]) -> Iterator[Line]:
    """A list of objects, as LongVideoBench has them: {"start": "00:00:01.500", "end": ..., "line": text}, or
    {"timestamp": [1.5, 3.0], "text": text}. Times may be numbers, seconds."""
    try:
        found = json.loads("\n".join(lines))
    except ValueError as error:
        raise DataError(f"is no JSON: {error}") from None
    if not isinstance(found, list):
        raise DataError("a list of lines was expected, such as " + JSON_LINE)
    for number, line in enumerate(found, 1):
        fields = line if isinstance(line, dict) else {}
        times = fields.get("timestamp", [fields.get("start"), fields.get("end")])
        text = fields.get("line", fields.get("text"))
        if not isinstance(text, str) or not isinstance(times, list) or len(times) != 2:
            raise DataError(f"line {number}: {JSON_LINE} was expected, not {str(line)[:60]}")
        start, end = (_json_time(value, number) for value in times)
        yield *_in_order(start, end, number), _plain(text.split("\n"))


def _json_time(value: Any, number: int) -> float:
    match = CLOCK.match(value.strip()) if isinstance(value, str) else None
    if match is not None:
        return _seconds(match.groups())
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise DataError(f"line {number}: a time was expected, such as 1.5 or 00:00:01.500, not {value!r}")


READERS: dict[str, Callable[[list[str]], Iterator[Line]]] = {
    **{".srt": _srt, ".vtt": _vtt, ".ass": _ass, ".ssa": _ass},
    ".json": _json,
}
