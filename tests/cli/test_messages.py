"""What messages advise exists: options are in some --help, and what is misspelt is answered with what is near."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from molmo2_nemo.cli.main import VERBS, build_parser, main, verb_parsers

ROOT = Path(__file__).parents[2]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Files whose texts have options of other programs (torchrun, sbatch, sacct, docker, git, pip, yt-dlp, gsutil), or of
# scripts that are run beside molmo2
OTHERS = (
    *("molmo2_nemo/launch/local.py", "molmo2_nemo/launch/slurm", "molmo2_nemo/launch/probes.py"),
    *("molmo2_nemo/rundir/code_state.py", "molmo2_nemo/rundir/jobs.py", "molmo2_nemo/compat.py"),
    *("molmo2_nemo/launch/readiness.py", "data_prep/bringing/recipes.py", "molmo2_nemo/convert/hf_config.py"),
)
WORDS_OF_OTHERS = {"molmo2_nemo/data/shards.py": {"--dereference"}}  # GNU tar's


def texts() -> Iterator[tuple[str, str]]:
    """Every string in the product's code that is no docstring, with its file."""
    for package in ("molmo2_nemo", "data_prep"):
        for file in sorted((ROOT / package).rglob("*.py")):
            name = str(file.relative_to(ROOT))
            tree = ast.parse(file.read_text())
            documents = {
                id(node.body[0].value)
                for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                and node.body
                and isinstance(node.body[0], ast.Expr)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
                    yield name, node.value


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                found |= options_of(one)
    return found


def test_options_in_messages_are_in_some_help():
    known, seen = options_of(build_parser()), 0
    for file, text in texts():
        for option in OPTION.findall(text):
            seen += 1
            if file.startswith(OTHERS) or option in WORDS_OF_OTHERS.get(file, ()):
                continue
            if f'add_argument("{option}"' in (ROOT / file).read_text():
                continue  # a script's own, beside molmo2
            assert option in known, f"{file}: {text!r} names {option}, which no verb has"
    assert seen > 100


def test_options_behind_a_verb_are_the_verbs():
    """`molmo2 shards check DIR --quick` in any text: shards has --quick."""
    verbs, seen = verb_parsers(build_parser()), 0
    for file, text in texts():
        for verb, rest in re.findall(r"molmo2 (\w+)([^\n;,()#]*)", text):
            if verb in VERBS:
                seen += 1
                for option in OPTION.findall(rest):
                    assert option in options_of(verbs[verb]), f"{file}: {text!r}: {verb} has no {option}"
    assert seen > 50


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["trian", "recipe=tiny"], "molmo2: error: no verb 'trian'; did you mean 'train'?"),
        (["xyzzy"], "molmo2: error: no verb 'xyzzy'; known: ask, convert,"),
        (["shards", "check", "here", "--quik"], "--quik: no such option of molmo2 shards; did you mean '--quick'?"),
        (["plan", "recipe=8b", "--jsn"], "--jsn: no such option of molmo2 plan; did you mean '--json'?"),
        (["convert", "export", "a", "b", "--formt", "x"], "--formt: no such option of molmo2 convert export; did you"),
        (["convert", "exprot", "a", "b"], "no 'exprot'; did you mean 'export'?"),
        (
            ["convert", "export", "a", "b", "--format", "remoet"],
            "--format: no 'remoet'; did you mean 'remote'?",
        ),
        (["shards", "chek", "here"], "no 'chek'; did you mean 'check'?"),
        (["status", "run", "more"], "unrecognized: more; see molmo2 status --help"),
    ],
)
def test_what_is_misspelt(capsys, words, answer):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2 and answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("train recipe=tinny", "tiny"),
        ("train recipe=tiny stage=sfft", "sft"),
        ("train recipe=tiny scale=gpu_lorra", "gpu_lora"),
        ("train recipe=tiny parallel.tensr=2", "parallel.tensor"),
        ("train recipe=tiny data.sources.demo.pth=x", "path"),
        ("plan recipe=4b stage=sft cluster=h10x8", "h100"),
        ("pipeline recipe=tiny sfft:seed=1", "sft"),
        ("preview recipe=tinny", "tiny"),
        ("mixture recipe=tinny", "tiny"),
        ("doctor --recipe tinny", "tiny"),
        ("prepare pixmo_capp --out out", "pixmo_cap"),
        ("prepare --list pixmo_capp", "pixmo_cap"),
        ("prepare own.jsonl --out out --for recipe=tinny", "tiny"),
        ("ask start What? --style long_captoin", "long_caption"),
        ("evaluate start --tasks chartqaa", "chartqa"),
        ("evaluate start --tasks chartqa parallel.tensr=2", "parallel.tensor"),
        ("generate start prompts.jsonl --score exact_mach", "exact_match"),
    ],
)
def test_what_is_near_is_named(words, near, capsys, tmp_path, monkeypatch):
    """Names of files in conf/, keys, data sets, styles, tasks, scorers, GPUs: of every verb that takes some."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text('{"question": "?", "answer": "a"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"question": "?", "answer": "a"}\n')
    (tmp_path / "start" / "weights").mkdir(parents=True)
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert "did you mean" in err and near in err.split("did you mean")[1], err
