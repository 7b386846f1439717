"""Hydra's options on our verbs: --cfg, --package, --info, --config-name, --multirun and completion by the shell."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import yaml

from molmo2_nemo.cli.completion import candidates
from molmo2_nemo.cli.main import build_parser, main
from molmo2_nemo.settings.compose import compose, group_options
from molmo2_nemo.settings.schema import to_dict


def out(capsys, *words: str, code: int = 0) -> str:
    assert main(list(words)) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def test_a_part_of_the_configuration(capsys):
    shown = out(capsys, "train", "recipe=tiny", "stage=long", "--cfg", "job", "--package", "stage.optim")
    assert shown.startswith("# @package stage.optim\n")
    assert yaml.safe_load(shown) == to_dict(compose(["recipe=tiny", "stage=long"]))["stage"]["optim"]
    assert out(capsys, "train", "recipe=tiny", "-c", "job", "-p", "stage.max_steps") == "60\n"
    said = out(capsys, "train", "recipe=tiny", "-c", "job", "-p", "stage.optm", code=2)
    assert "--package stage.optm: no 'optm' in stage; did you mean 'optim'?" in said
    assert "--package belongs to --cfg" in out(capsys, "train", "recipe=tiny", "-p", "stage", code=2)


def test_what_hydra_composed(capsys):
    shown = out(capsys, "train", "recipe=tiny", "stage=long", "parallel=cp2", "--cfg", "hydra")
    assert "a run reads only what was chosen" in shown
    choices = yaml.safe_load(shown)["hydra"]["runtime"]["choices"]
    assert (choices["recipe"], choices["stage"], choices["parallel"]) == ("tiny", "long", "cp2")
    both = yaml.safe_load(out(capsys, "train", "recipe=tiny", "--cfg", "all"))
    assert {"hydra", *to_dict(compose(["recipe=tiny"]))} == set(both)
    stages = out(capsys, "pipeline", "recipe=tiny", "--cfg", "hydra", "--package", "hydra.runtime.choices")
    assert [part["stage"] for part in yaml.safe_load_all(stages)] == ["pretrain", "sft", "long"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("defaults", "recipe/stages/tiny_long"),
        ("defaults-tree", "parallel: cp2"),
        ("searchpath", "molmo2"),
        ("config", ""),
    ],
)
def test_info_is_hydras_own(capsys, tmp_path, kind, said):
    (tmp_path / "molmo2_mine").mkdir()
    words = ["recipe=tiny", "stage=long", "parallel=cp2", "--config-dir", str(tmp_path / "molmo2_mine")]
    shown = out(capsys, "train", *words, "--info", kind)
    assert said in shown and shown.count("\n") > 5
    assert (str(tmp_path) in shown) == (kind in ("searchpath", "config"))


def test_info_before_a_setting_and_of_an_unknown_kind(capsys):
    assert "data: demo" in out(capsys, "train", "--info", "recipe=tiny")  # all of it
    assert "--info tree: " in out(capsys, "train", "recipe=tiny", "--info", "tree", code=2)


def test_a_configuration_of_ones_own_by_name(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, override recipe: tiny, _self_]\nstages: [sft, long]\nseed: 7\n"
    )
    where = ["--config-dir", str(tmp_path), "--config-name", "mine"]
    assert out(capsys, "train", *where, "--cfg", "job", "-p", "seed") == "7\n"
    stages = list(yaml.safe_load_all(out(capsys, "pipeline", *where, "--cfg", "job")))
    assert [(stage["stage"]["name"], stage["seed"]) for stage in stages] == [("sft", 7), ("long", 7)]
    assert "--config-name mine" in out(capsys, "plan", *where, "cluster=h100x8", "nodes=1")


def test_configurations_of_a_sweep(capsys):
    words = ["--multirun", "recipe=tiny", "sft:seed=1,2", "stages=[pretrain,sft]", "--cfg", "job", "-p", "seed"]
    assert out(capsys, "pipeline", *words).split("---\n") == ["6198\n", "1\n", "6198\n", "2\n"]
    assert "--multirun: no setting has several values" in out(capsys, "train", "-m", "recipe=tiny", code=2)
    assert "leave out --multirun" in out(capsys, "train", "-m", "--config", "x.yaml", code=2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("molmo2 tra", ["train "]),
        ("molmo2 train --confi", ["--config-dir ", "--config-name ", "--config "]),
        ("molmo2 train --cfg j", ["job "]),
        ("molmo2 train reci", ["recipe="]),
        ("molmo2 train recipe=lon", ["recipe=longvila ", "recipe=longvita "]),
        ("molmo2 train stage.opt", ["stage.optim."]),
        ("molmo2 train stage.optim.ll", ["stage.optim.llm."]),
        ("molmo2 train stage.optim.llm.", ["stage.optim.llm.lr=", "stage.optim.llm.warmup_steps="]),
        ("molmo2 train parallel.sequence=", ["parallel.sequence=true ", "parallel.sequence=false "]),
        ("molmo2 train parallel.overlap_grad_reduce=n", ["parallel.overlap_grad_reduce=null "]),
        ("molmo2 train parallel.grad_reduce=", ["parallel.grad_reduce=fp32 ", "parallel.grad_reduce=bf16 "]),
        ("molmo2 train seed=", []),
        ("molmo2 train no.such=", []),
        ("molmo2 pipeline sft:stage.max", ["sft:stage.max_steps="]),
        ("molmo2 pipeline pret", ["pretrain:"]),
        ("molmo2 status ru", []),
        ("molmo2 nonsense x", []),
    ],
)
def test_candidates(line, words):
    assert candidates(line, build_parser()) == words


def test_a_folder_of_ones_own_is_completed(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine_all.yaml").write_text("")
    assert candidates(f"molmo2 train --config-dir {tmp_path} data=mine", build_parser()) == ["data=mine_all "]
    assert len(candidates("molmo2 train data=", build_parser())) == len(group_options("data"))


COMPLETE = r"""
molmo2() { "$PYTHON" -m molmo2_nemo.cli.main "$@"; }
eval "$(molmo2 --shell-completion install=bash)"
complete -p molmo2
COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'
for COMP_LINE in "molmo2 train recipe=longvi" "molmo2 pipeline sft:stage.max" "molmo2 sta"; do
    COMP_POINT=${#COMP_LINE} _molmo2_completion
    printf '<%s>' "${COMPREPLY[@]}"; echo
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes():
    """In bash's own way: behind an = only what comes after it."""
    done = subprocess.run(["bash", "-c", COMPLETE], capture_output=True, text=True, env={"PYTHON": sys.executable})
    lines = done.stdout.splitlines()
    assert lines[0].endswith("-F _molmo2_completion molmo2"), done.stderr
    assert lines[1:] == ["<longvila ><longvita >", "<stage.max_steps=>", "<status >"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_lines_for_each_shell(capsys, shell):
    for action in ("install", "uninstall"):
        with pytest.raises(SystemExit) as left:
            main(["-sc", f"{action}={shell}"])
        assert left.value.code == 0 and "molmo2" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["--shell-completion", f"instal={shell}"])
    assert left.value.code == 2 and f"did you mean 'install={shell}'?" in capsys.readouterr().err
