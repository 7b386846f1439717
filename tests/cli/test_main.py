"""The command itself: help, exit codes, what it imports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from molmo2_nemo.cli.main import VERBS, main


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


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and f"molmo2 {verb}" in out.split("examples:")[1]


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
    ],
)
def test_mistakes_end_with_one_line_and_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert expected in err and err.startswith("molmo2: error: ") and err.count("\n") == 1


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
    assert "nemo-toolkit" in capsys.readouterr().out
