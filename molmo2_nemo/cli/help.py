"""The parser of the command and of its verbs: --help broken to the width of the terminal, and what is misspelt answered
with what is near."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import Any

from molmo2_nemo.errors import nearest

LINE = 120  # of the sources; a line of a docstring that had room for the next word ends there on purpose


class HelpFormatter(argparse.HelpFormatter):
    """Keeps paragraphs, lists and examples apart, as argparse's raw formatter does, and breaks what is too wide."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for line in joined(text.splitlines()):
            if line.startswith(" "):
                lines += example(line, width)
            else:
                lines += textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
        return "\n".join(indent + line for line in lines)


class Parser(argparse.ArgumentParser):
    """Lays --help out with `HelpFormatter`, and suggests the nearest of the words that an argument takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **kwargs})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"no {value!r}; {nearest(str(value), map(str, action.choices))}")


def joined(lines: list[str]) -> list[str]:
    """Lines of prose that only the width of the sources has parted, in one."""
    found: list[str] = []
    before = ""  # the last line as it stands in the source
    for line in lines:
        prose = before and line and not before.startswith(" ") and not line.startswith(" ")
        if prose and len(before) + 1 + len(line.split()[0]) > LINE:
            found[-1] += f" {line}"
        else:
            found.append(line)
        before = line
    return found


def example(line: str, width: int) -> list[str]:
    """A line of the examples: where it is too wide its remark goes above it, and the command goes on in another."""
    if len(line) <= width:
        return [line]
    command, _, remark = line.partition("  # ")
    found = textwrap.wrap(f"  # {remark.strip()}", width, subsequent_indent="  # ") if remark else []
    words = re.findall(r'(?:[^\s"]|"[^"]*")+', command)
    row = "  " + words[0]
    for word in words[1:]:
        if len(row) + len(word) + 3 > width:
            found.append(f"{row} \\")
            row = f"      {word}"
        else:
            row += f" {word}"
    return [*found, row]
