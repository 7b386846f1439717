"""The command itself: help, exit codes, what it imports."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from molmo2_nemo.cli.help import example, joined
from molmo2_nemo.cli.main import VERBS, build_parser, main
from molmo2_nemo.launch import probes


def test_help_imports_nothing_heavy():
    code = (
        "import sys, json\n"
        "from molmo2_nemo.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('MODULES ' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = set(json.loads(out.split("MODULES ")[1]))
    heavy = {"torch", "nemo", "megatron", "lightning", "hydra", "omegaconf", "numpy", "rich", "matplotlib", "av", "PIL"}
    assert not modules & heavy
    assert all(verb in out for verb in VERBS)


def verbs(parser: argparse.ArgumentParser | None = None, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every verb, and the verbs inside it: ("train",), ("convert",), ("convert", "import"), ..."""
    if words:
        yield words
    for action in (parser or build_parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, part in action.choices.items():
                yield from verbs(part, (*words, name))


@pytest.mark.parametrize("words", verbs(), ids=" ".join)
def test_every_verb_has_help_with_an_example(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and f"  molmo2 {' '.join(words)} " in f"{out.split('examples:')[1]} "


@pytest.mark.parametrize("words", [(), *verbs()], ids=" ".join)
def test_help_fits_80_columns(words, capsys, monkeypatch):
    """Also a remark and a command that are too long for one line are whole."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    said = " ".join(out.replace("\\\n", " ").replace("\n  # ", " ").split())
    parser = build_parser()
    for word in words:
        parser = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))[word]
    for line in (parser.epilog or "").splitlines():
        command, _, remark = line.partition("  # ")
        assert " ".join(command.split()) in said and " ".join(remark.split()) in said


def test_lines_that_end_on_purpose_stay_apart():
    long = "word " * 23 + "words"
    assert joined([long, "goes on", "", "a list:", "item", "  an example"]) == [
        f"{long} goes on",
        "",
        "a list:",
        "item",
        "  an example",
    ]
    whole = '  molmo2 ask "one text in quotes" here   # said of it'
    assert example(whole, 80) == [whole]
    assert example(whole, 40) == ["  # said of it", '  molmo2 ask "one text in quotes" here']
    assert example(whole, 36) == ["  # said of it", '  molmo2 ask "one text in quotes" \\', "      here"]


def test_the_verbs_inside_verbs_are_found():
    assert {words[0] for words in verbs()} == set(VERBS) and ("convert", "import") in verbs()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "recipe=tiny", "stage.max_step=1"], "did you mean 'stage.max_steps'?"),
        (["train", "recipe=tiny", "data.sources.demo.path=/absent"], "/absent"),
        (["train", "recipe=tiny", "init_from=/absent"], "no such checkpoint"),
        (["pipeline", "recipe=tiny", "stage=sft"], "molmo2 train stage=sft"),
        (["ask", "/absent", "what?"], "/absent"),
        (["ask", "/tmp", "--image", "/absent.jpg", "what?"], "/absent.jpg: no such file"),
        (["convert", "export", "/absent", "/absent2"], "/absent"),
        (["doctor", "--recipe", "8c"], "did you mean '8b'?"),
        (["train", "--config", "/absent/config.yaml"], "/absent/config.yaml does not exist"),
        (["train", "--config", "x.yaml", "stage=sft"], "it takes no settings"),
        (["train", "recipe=tiny", "--dry-run"], "it needs cluster=slurm"),
        (["pipeline", "recipe=tiny", "--dry-run"], "it needs cluster=slurm"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert expected in err and err.startswith("molmo2: error: ") and err.count("\n") == 1


def bad_calls() -> list[list[str]]:
    """For every verb, and every part of one, a call in the right form with nothing right in it: found in the parser,
    so that a new verb is tested from its first day."""

    def calls(parser: argparse.ArgumentParser, words: list[str]) -> Iterator[list[str]]:
        given: list[str] = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, part in action.choices.items():
                    yield from calls(part, [*words, name])
                return
            value = str(next(iter(action.choices))) if action.choices else "7" if action.type is int else "/absent/it"
            if not action.option_strings:
                given.append("no_such_setting=1" if action.dest == "overrides" else value)
            elif action.required:
                given += [action.option_strings[0], value]
        yield [*words, *(given or ["--no-such-option"])]

    return list(calls(build_parser(), []))


def test_every_verb_is_among_the_bad_calls():
    assert {call[0] for call in bad_calls()} == set(VERBS)


@pytest.mark.parametrize("call", bad_calls(), ids=" ".join)
def test_bad_input_is_told_in_one_line(call, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(call)
    except SystemExit as exit_:
        code = exit_.code
    err = capsys.readouterr().err
    assert code == 2, err
    last = err.splitlines()[-1]
    assert "error: " in last and "Traceback" not in err
    if not err.startswith("usage:"):
        assert err.count("\n") == 1 and err.startswith("molmo2: error: ")
        named = ("/absent", "no_such_setting", "--")  # the last: an option that is missing
        assert any(word in last for word in named), "the message does not name what is wrong"
    assert list(tmp_path.iterdir()) == [], "something was written"


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--cgf", "job"], ["doctor", "x=1"], []])
def test_mistyped_verbs_and_options(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_cfg_job_prints_what_would_run(capsys):
    assert main(["train", "recipe=tiny", "--cfg", "job", "stage=long", "stage.max_steps=3"]) == 0
    out = capsys.readouterr().out
    assert "max_steps: 3" in out and "name: long" in out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "nemo-toolkit" in out and "gloo" in out and "h264" in out and "/dev/shm" in out and "29500" in out
    assert out.endswith("ready: molmo2 demo\n")


def test_doctor_says_what_a_recipe_lacks(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MOLMO2_TOKENIZER", str(tmp_path / "absent"))
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    assert main(["doctor", "--recipe", "8b", "--dir", str(tmp_path / "runs")]) == 1
    out = capsys.readouterr().out
    recipes = out.split("\nrecipes\n")[1]
    assert "export MOLMO2_TOKENIZER=" in recipes and "120 of 120 data sets have no shards: molmo2 prepare" in recipes
    assert main(["doctor", "--recipe", "tiny"]) == 0


def test_doctor_names_what_is_missing_or_does_not_fit(capsys, monkeypatch):
    real = probes.version_of
    fake = {"lhotse": None, "nemo-toolkit": "3.0.1", "torch": "2.9.0a0+nv25.10"}
    monkeypatch.setattr(probes, "version_of", lambda name: fake[name] if name in fake else real(name))
    assert main(["doctor", "--recipe", "tiny"]) == 1
    out = capsys.readouterr().out
    assert "missing: lhotse; pip install lhotse" in out and "3.0.1          was not tried, only 2.7.3" in out
    assert "missing: torch" not in out and "ready: " not in out
