"""Completion of the command line by the shell, asked for as Hydra's is: --shell-completion install=bash prints lines
for the shell to evaluate, which then ask --shell-completion query=bash for the words that could come next."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from molmo2_nemo.errors import nearest

# A shell that splits words at = and : wants what comes behind them only.
BASH = """\
_molmo2_completion() {
    local line="${COMP_LINE:0:$COMP_POINT}" before="" IFS=$'\\n'
    if [[ "${line##* }" =~ ^(.*[=:])[^=:]*$ && $COMP_WORDBREAKS == *=* ]]; then before="${BASH_REMATCH[1]}"; fi
    COMPREPLY=($(COMP_LINE="$line" molmo2 --shell-completion query=bash 2> /dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o nospace -o default -F _molmo2_completion molmo2
"""
FISH = """\
complete -c molmo2 -a '(env COMP_LINE=(commandline -cp | string collect) molmo2 --shell-completion query=fish)'
"""
INSTALL = {"bash": BASH, "zsh": f"autoload -Uz bashcompinit && bashcompinit\n{BASH}", "fish": FISH}
UNINSTALL = {
    "bash": "unset -f _molmo2_completion; complete -r molmo2\n",
    "zsh": "unset -f _molmo2_completion; complete -r molmo2\n",
    "fish": "complete -c molmo2 -e\n",
}
COMPOSING = ("train", "pipeline", "plan", "mixture", "preview")  # verbs that take settings


class ShellCompletion(argparse.Action):
    """--shell-completion install=SHELL, uninstall=SHELL or query=SHELL: prints, and ends the command."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        action, _, shell = str(values).partition("=")
        if action not in ("install", "uninstall", "query") or shell not in INSTALL:
            close = nearest(str(values), [f"{a}={s}" for a in ("install", "uninstall") for s in INSTALL])
            parser.error(f"{option} {values}: {close}")
        if action == "query":
            print("\n".join(candidates(os.environ.get("COMP_LINE", ""), parser)))
        else:
            print({"install": INSTALL, "uninstall": UNINSTALL}[action][shell], end="")
        parser.exit()


def verb_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    return next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})


def candidates(line: str, parser: argparse.ArgumentParser) -> list[str]:
    """The words that the last word of a line may become, whole, in order; one that is complete ends in a blank.

    Args:
        line: of the command, up to the cursor.
        parser: of all verbs.
    """
    *before, word = line.split(" ")
    before = [w for w in before if w]
    verbs = verb_parsers(parser)
    if len(before) < 2:
        return _starting(word, [f"{verb} " for verb in verbs])
    verb = verbs.get(before[1])
    if verb is None:
        return []
    if word.startswith("-"):
        return _starting(word, [f"{option} " for option in verb._option_string_actions if option.startswith("--")])
    last = verb._option_string_actions.get(before[-1])
    if last is not None and last.nargs is None:  # its value
        return _starting(word, [f"{choice} " for choice in last.choices or ()])
    if before[1] not in COMPOSING:
        return []
    return _settings(word, _value_of(before, ("--config-dir", "-cd")), before[1])


def _settings(word: str, config_dir: str | None, verb: str) -> list[str]:
    """Completions of a setting: its key part by part, and the values of a group or of a setting with a few."""
    from pathlib import Path

    from molmo2_nemo.settings.compose import GROUPS, group_options

    config_dir = config_dir if config_dir and Path(config_dir).is_dir() else None
    head = ""
    if verb == "pipeline" and ":" in word.partition("=")[0]:
        head, _, word = word.partition(":")
        head += ":"
    key, equals, _ = word.partition("=")
    groups = [group for group in GROUPS if verb != "pipeline" or group != "stage"]
    if not equals:
        found = [*(f"{group}=" for group in groups), *_keys(word)]
        if verb == "pipeline" and not head:
            found += [f"{stage}:" for stage in group_options("stage", config_dir)]
        return [head + text for text in _starting(word, dict.fromkeys(found))]
    values = group_options(key, config_dir) if key in groups else _values(key)
    return [head + text for text in _starting(word, [f"{key}={value} " for value in values])]


def _keys(word: str) -> list[str]:
    """Keys of settings up to the part that is being written: `stage.` for a group, `stage.max_steps=` for a value."""
    from molmo2_nemo.settings.run import RunConfig
    from molmo2_nemo.settings.schema import by_dotted_key, to_dict

    depth = word.count(".") + 1
    found = []
    for key, value in by_dotted_key(to_dict(RunConfig())).items():
        parts = key.split(".")
        whole = len(parts) <= depth and value != {}
        found.append(f"{'.'.join(parts[:depth])}{'=' if whole else '.'}")
    return found


def _values(key: str) -> Sequence[str]:
    """The values of a setting that has a few by its type; none for others."""
    from molmo2_nemo.settings.run import RunConfig

    hint: Any = RunConfig
    for part in key.split("."):
        hint = (
            get_type_hints(hint).get(part) if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__") else None
        )
    kinds = get_args(hint) if get_origin(hint) is not None and type(None) in get_args(hint) else (hint,)
    values: list[str] = []
    for kind in kinds:
        if kind is type(None):
            values.append("null")
        elif kind is bool:
            values += ["true", "false"]
        elif get_origin(kind) is Literal:
            values += [str(value) for value in get_args(kind)]
        elif get_origin(kind) is Union:
            return []
    return values if values != ["null"] else []


def _starting(word: str, found: Iterable[str]) -> list[str]:
    return [text for text in found if text.startswith(word)]


def _value_of(words: Sequence[str], options: Sequence[str]) -> str | None:
    """The value of an option among the words before the cursor."""
    for number, word in enumerate(words):
        if word in options and number + 1 < len(words):
            return words[number + 1]
        if word.partition("=")[0] in options and "=" in word:
            return word.partition("=")[2]
    return None
