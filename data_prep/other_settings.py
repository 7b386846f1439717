"""How the settings of two data sets differ, in words: those of the command line, not of the manifest."""

from __future__ import annotations

from typing import Any

OPTIONS = {  # setting -> the option that says it
    **{name: f"--{name}" for name in ("name", "seed", "limit", "part", "split", "gop")},
    **{name: f"--{name.replace('_', '-')}" for name in ("repeat_media", "cut_clips", "video_height", "video_fps")},
    "held_out": "--hold-out",
    "bytes_per_shard": "--shard-mb",
    "records_per_shard": "--shard-records",
    "max_media_bytes": "--max-media-mb",
    "max_image_side": "--max-image-side",
    "tiles": "tiles that --max-image-side leaves room for",
}
LEFT_OUT = {"split": "train", "repeat_media": False, "gop": 0, "max_image_side": 0}  # what no word of a setting means
MEGABYTES = ("bytes_per_shard", "max_media_bytes")
NONE_AT_0 = ("limit", "gop", "video_height", "video_fps", "max_image_side")


def changed_file(before: Any, now: Any) -> str:
    """The name of a user's own file that is the same but for its content; "" where something else differs."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return ""
    (name, content), (now_name, now_content) = file_notes(before), file_notes(now)
    same = {**before, "notes": ""} == {**now, "notes": ""} and name == now_name
    return name if same and content != now_content else ""


def file_notes(origin: Any) -> tuple[str, str]:
    """(name, the rest) of what a manifest says of a user's own files; empty where it says nothing."""
    notes = origin.get("notes", "") if isinstance(origin, dict) else ""
    name, _, rest = str(notes).partition(" with SHA-256 ")
    return name, rest


def change(name: str, there: Any, now: Any, places: tuple[str, str] = ("there", "now")) -> str:
    """What differs of a setting, in the words of the command line.

    Args:
        places: where the two values are.
    """
    first, second = places
    if name == "checked_for":
        return f"{_limits(there)} {first}, {_limits(now)} {second}"
    if name == "origin" and isinstance(there, dict) and isinstance(now, dict):
        before, after = file_notes(there)[0], file_notes(now)[0]
        if before and after and before != after:
            only = "only lines added at the end of one text file are taken up"
            return f"its files: {before} {first}, {after} {second}; {only}"
        parts = [part for part in {**there, **now} if there.get(part) != now.get(part)]
        return ", ".join(f"its {p}: {_words(p, there.get(p))} {first}, {_words(p, now.get(p))} {second}" for p in parts)
    return f"{OPTIONS.get(name, name)}: {_words(name, there)} {first}, {_words(name, now)} {second}"


def _words(name: str, value: Any) -> str:
    """A value as the option has it."""
    value = LEFT_OUT.get(name) if value is None else value
    if name == "held_out" and isinstance(value, dict):
        return f"{100 * value['share']:g}%{' (what is held out)' if value['held'] else ''}"
    if isinstance(value, bool):
        return "given" if value else "not given"
    if value is None or (name in NONE_AT_0 and value == 0):
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return f"{value / 1e6:g}" if name in MEGABYTES else str(value)


def _limits(given: dict[str, Any] | None) -> str:
    pairs = [f"{key}={value}" for key, value in (given or {}).items()]
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return f"limits of a run (--for: {', '.join(pairs[:3])}{more})" if pairs else "the default limits"
