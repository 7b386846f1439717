"""README's path for the 4B on one GPU: every line is understood, and those that need no GPU and no weights are run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import data_prep
from molmo2_nemo.cli.main import build_parser, main
from molmo2_nemo.launch.capacity import Machine, capacity_problems
from molmo2_nemo.launch.disk import checkpoint_bytes
from molmo2_nemo.launch.start import resolve_start, start_problems
from molmo2_nemo.plan.memory import GIB
from molmo2_nemo.rundir.summary import not_a_checkpoint
from molmo2_nemo.settings import checks
from molmo2_nemo.settings.compose import compose

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(after: str, start: str) -> list[str]:
    """The lines of the first block behind a heading that begins with `start`."""
    section = README.split(after)[1]
    return next(b for b in re.findall(r"```\n(.*?)```", section, re.S) if b.lstrip().startswith(start)).splitlines()


LINES = [shlex.split(line) for line in block("\n## The 4B on one GPU\n", "hf download")]
CALLS = {words[1]: words[1:] for words in LINES if words[0] == "molmo2" and words[1] != "convert"}
CONVERT = {words[2]: words[1:] for words in LINES if words[:2] == ["molmo2", "convert"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which step 4 of README is done, and what the first lines of the path bring stands there by name."""
    folder = tmp_path_factory.mktemp("readme")
    media = Path(data_prep.__file__).parent / "demo_media"
    (folder / "mine").mkdir()
    copied, rows = 0, []
    for line in (line.strip() for line in block("**Your own data.**", "mkdir")):
        if line.startswith("{"):
            rows.append(line)
        elif line.startswith("mkdir"):
            for name in re.findall(r"data_prep/demo_media/(\S+)", line):
                for file in media.glob(name):
                    shutil.copy(file, folder / "mine")
                    copied += 1
    assert copied > 2 and len(rows) == 3 and all(map(json.loads, rows))
    (folder / "mine" / "data.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "checkpoints" / "4b" / "weights").mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MOLMO2_TOKENIZER", "tiny")  # the shipped one, in place of the published model's


def test_every_line_is_understood():
    """By the parser, and with what an earlier line makes."""
    assert {words[0] for words in LINES} == {"hf", "molmo2", "export"}
    for words in LINES:
        if words[0] == "molmo2":
            build_parser().parse_args(words[1:])
    hub = next(words for words in LINES if words[0] == "hf")
    assert CONVERT["import"][2:] == [hub[-1], "checkpoints/4b"]
    (exported,) = (words[1] for words in LINES if words[0] == "export")
    assert exported == "MOLMO2_TOKENIZER=checkpoints/4b/tokenizer"
    run = next(word for word in CALLS["train"] if word.startswith("output_dir=")).removeprefix("output_dir=")
    assert {CALLS["ask"][1], CALLS["evaluate"][1], CONVERT["export"][2]} == {run}


def test_the_data_are_prepared_and_the_run_could_start(capsys):
    assert main(CALLS["prepare"]) == 0
    assert "3 records" in capsys.readouterr().out
    cfg = compose(CALLS["train"][1:])
    assert (cfg.model.preset, cfg.stage.lora.rank, list(cfg.data.sources)) == ("4b", 64, ["mine"])
    resolve_start(cfg)
    problems = [*checks.find_problems(cfg), *start_problems(cfg)]
    assert problems == []
    assert list(capacity_problems(cfg, here=Machine((80 * GIB,), 64 * GIB))) == []
    assert any(capacity_problems(cfg, here=Machine((12 * GIB,), 64 * GIB)))
    assert not_a_checkpoint(Path(str(cfg.init_from))) is None and checkpoint_bytes(cfg) < 15e9


def test_the_plan_says_that_it_fits_as_readme_does(capsys):
    assert main(CALLS["plan"]) == 0
    shown = capsys.readouterr().out
    (said,) = re.findall(r"\((\d+) GiB by the planner", README)
    assert re.search(rf"\(as set\) +1 +full +{said} ", shown), shown
