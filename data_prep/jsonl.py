"""Own data: a JSONL file that names pictures and videos -> shards with a manifest.

    python -m data_prep.jsonl my.jsonl OUT

One line is one record; paths are relative to the JSONL file. The short forms

    {"image": "cat.jpg", "caption": "A cat looks into the camera."}
    {"image": "cat.jpg", "question": "Which animal is this?", "answer": "a cat"}
    {"video": "clip.mp4", "question": "What happens?", "answer": "A rabbit yawns."}
    {"messages": ["What is 2 + 2?", "4"]}

stand for the full one, whose `annotations` share one visual input (a message tree):

    {"images": ["a.jpg", "b.png"], "annotations": [{"style": "user_qa", "question": "...", "answer": "..."}, ...]}

Besides `annotations`: `key`, `video`, `subtitles`, `clip`, `sampling`, `weight`, as in a shard's JSON member.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from molmo2_nemo.data.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadRecord, DataError, load_json, parse_record
from molmo2_nemo.data.shard_writer import write_shards

COPIED = ("subtitles", "clip", "sampling", "weight")
KNOWN = {"key", "image", "images", "video", "caption", "question", "answer", "messages", "annotations", *COPIED}


class LineError(DataError):
    """A line of the JSONL file is wrong; the message starts with file and line number."""


def pack_entry(entry: dict[str, Any], folder: Path, key: str) -> tuple[str, dict[str, bytes]]:
    """One entry (see the module's text) -> (key, members of the shard), checked as the trainer will check it.

    Raises:
        ValueError: what is wrong with the entry or its files.
    """
    unknown = sorted(set(entry) - KNOWN)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(KNOWN))}")
    key = entry.get("key", key)
    if not isinstance(key, str):
        raise ValueError(f"key must be a string, not {key!r}")
    data: dict[str, Any] = {name: entry[name] for name in COPIED if name in entry}
    data["annotations"] = _annotations(entry)
    members: dict[str, bytes] = {}
    pictures = entry.get("images", [entry["image"]] if "image" in entry else [])
    if not isinstance(pictures, list):
        raise ValueError(f"images must be a list of paths, not {pictures!r}")
    if pictures:
        data["images"] = []
    for i, path in enumerate(pictures):
        content, suffix = _media(path, folder, IMAGE_SUFFIXES, _check_picture)
        data["images"].append(f"{i}.{suffix}")
        members[f"{i}.{suffix}"] = content
    if "video" in entry:
        content, suffix = _media(entry["video"], folder, VIDEO_SUFFIXES, _check_video)
        data["video"] = suffix
        members[suffix] = content
    members["json"] = json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    try:
        parse_record(key, members)
    except BadRecord as error:
        raise ValueError(error.detail) from None
    return key, members


def _annotations(entry: dict[str, Any]) -> Any:
    full = list(entry.get("annotations", [])) if isinstance(entry.get("annotations", []), list) else None
    if full is None:
        raise ValueError(f"annotations must be a list, not {entry['annotations']!r}")
    if "caption" in entry:
        full.append({"style": "video_long_caption" if "video" in entry else "long_caption", "text": entry["caption"]})
    if ("question" in entry) != ("answer" in entry):
        raise ValueError("question and answer belong together; one of them is missing")
    if "question" in entry:
        full.append({"style": "user_qa", "question": entry["question"], "answer": entry["answer"]})
    if "messages" in entry:
        full.append({"style": "text_sft", "messages": entry["messages"]})
    if not full:
        raise ValueError("nothing to learn: give caption, question and answer, messages, or annotations")
    return full


def _media(path: Any, folder: Path, allowed: frozenset[str], check: Any) -> tuple[bytes, str]:
    if not isinstance(path, str):
        raise ValueError(f"a path must be a string, not {path!r}")
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in allowed:
        raise ValueError(f"{path}: the suffix {suffix!r} is not one of {', '.join(sorted(allowed))}")
    try:
        content = (folder / path).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder / path} cannot be read: {error.strerror}") from None
    try:
        check(content)
    except Exception as error:
        raise ValueError(f"{folder / path} cannot be decoded: {str(error) or type(error).__name__}") from None
    return content, suffix


def _check_picture(content: bytes) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        image.verify()


def _check_video(content: bytes) -> None:
    import av

    with av.open(io.BytesIO(content)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Records of a JSONL file; empty lines are skipped, keys default to the line number.

    Raises:
        LineError: "file:line: what is wrong".
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = load_json(f"line {number}", {"json": line.removeprefix(b"\xef\xbb\xbf")})
                yield pack_entry(entry, path.parent, f"{number:08d}")
            except BadRecord as error:
                raise LineError(f"{path}:{number}: {error.detail.removeprefix('.json ')}") from None
            except ValueError as error:
                raise LineError(f"{path}:{number}: {error}") from None


def pack(
    records: Iterable[tuple[str, dict[str, bytes]]], out: Path, *, overwrite: bool = False, per_shard: int = 1000
) -> int:
    """Write the shards of one data set (whole or not at all); returns the number of records."""
    manifest = write_shards(out, records, records_per_shard=per_shard, overwrite=overwrite)
    return int(manifest["records"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.jsonl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jsonl", type=Path)
    parser.add_argument("out", type=Path, help="folder of the new data set")
    parser.add_argument("--per-shard", type=int, default=1000, help="records per shard")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there")
    args = parser.parse_args(argv)
    try:
        count = pack(read_jsonl(args.jsonl), args.out, overwrite=args.overwrite, per_shard=args.per_shard)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {count} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
