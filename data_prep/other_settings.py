"""How the settings of two data sets differ, in words."""

from __future__ import annotations

from typing import Any


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


def change(name: str, there: Any, now: Any) -> str:
    """What differs of a setting; of the limits that records were checked for, the first few."""
    if name == "checked_for":
        return f"{_limits(there)} there, {_limits(now)} now"
    before, after = (file_notes(origin)[0] if name == "origin" else "" for origin in (there, now))
    if before and after and before != after:
        return f"its files: {before} there, {after} now; only lines added at the end of one text file are taken up"
    return f"{name}: {there} there, {now} now"


def _limits(given: dict[str, Any] | None) -> str:
    pairs = [f"{key}={value}" for key, value in (given or {}).items()]
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return f"limits of a run (--for: {', '.join(pairs[:3])}{more})" if pairs else "the default limits"
