"""Whether a checkpoint can answer is said before its weights are read or ranks are started."""

from __future__ import annotations

from pathlib import Path

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.convert import import_checkpoint
from molmo2_nemo.errors import UserError
from molmo2_nemo.inference.load import opened
from molmo2_nemo.inference.prompt import Shown
from molmo2_nemo.launch import answering
from molmo2_nemo.launch.answering import layout_problems, memory_problems
from molmo2_nemo.launch.capacity import PROCESS, Machine
from molmo2_nemo.launch.ranks import layout_of
from molmo2_nemo.launch.start import evaluation_problems
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.run import ParallelConfig
from tests.convert.test_parity import tiny_folder

GIB = 2**30
NUMBERS = 2_500_000  # of the tiny model's parameters, about


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return import_checkpoint(tiny_folder(folder / "hf"), folder / "megatron")


@pytest.mark.parametrize("verb", [["ask", "CKPT", "What?"], ["generate", "CKPT", "PROMPTS"]])
def test_everything_that_does_not_fit_is_said_at_once(checkpoint, tmp_path, capsys, verb, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"question": "What?"}')
    names = {"CKPT": str(checkpoint), "PROMPTS": str(tmp_path / "prompts.jsonl")}
    words = [names.get(word, word) for word in verb]

    def started(*_):
        raise AssertionError("ranks were started")

    monkeypatch.setattr("molmo2_nemo.launch.ranks.run_ranks", started)
    assert main([*words, "--max-new-tokens", "4096", "--layout", "parallel.tensor=3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("molmo2: error: 4 things that cannot be had:") and said.count("\n  - ") == 4
    assert "parallel.tensor=3 does not divide the 2 key/value heads of the tiny model; use a divisor of 2" in said
    assert "--max-new-tokens 4096: such an answer takes more than the 4,096 positions" in said
    assert main([*words, "--frames", "300"]) == 2
    assert "warning: --frames has no effect" in (said := capsys.readouterr().err) and "--beyond-range" in said


def test_layouts_that_fit_have_no_problems(checkpoint):
    found = opened(checkpoint)
    for layout in (ParallelConfig(tensor=2, data=3), ParallelConfig(context=4, context_ulysses=2)):
        assert not list(layout_problems(layout, found))


def test_memory(checkpoint):
    """The least that a model takes: its weights, the libraries of each process, a prompt's crops, keys and values."""
    found, two = opened(checkpoint), ParallelConfig(data=2)
    (said,) = memory_problems(two, found, Shown(), Machine((), 1.5 * GIB))
    assert said.startswith("the weights of the tiny model take at least 2.0 GiB of memory in 2 processes, of which 1.5")
    room = 2 * PROCESS + 0.2 * GIB
    assert not list(memory_problems(two, found, Shown(frames=200), Machine((), room)))
    crop = 81 * 588  # patches of a crop, bytes of a patch
    (said,) = memory_problems(two, found, Shown(frames=20_000), Machine((), room))
    assert said.startswith("--frames 20000: such a film takes at least ") and said.endswith("frames; ask for fewer")
    fits = int(said.split("room for ")[1].split()[0].replace(",", ""))
    assert 200 < fits < 0.2 * GIB / (2 * 2 * crop)  # held twice by each process
    assert not list(memory_problems(two, found, Shown(frames=fits - 1), Machine((), room)))


def test_memory_of_gpus(checkpoint):
    found = opened(checkpoint)
    (said,) = memory_problems(ParallelConfig(data=2), found, Shown(), Machine((80.0 * GIB,), GIB))
    assert said.startswith("the layout takes 2 GPUs, here: 1;")
    (said,) = memory_problems(ParallelConfig(), found, Shown(), Machine((1.0 * NUMBERS,), GIB))
    assert "share them with parallel.tensor" in said
    (said,) = memory_problems(ParallelConfig(), found, Shown(frames=200_000), Machine((80.0 * GIB,), GIB))
    assert "of memory, of which 1.0 GiB are free" in said
    assert not list(memory_problems(ParallelConfig(), found, Shown(frames=200), Machine((80.0 * GIB,), GIB)))


def test_a_rank_of_ours_does_not_look_again(monkeypatch, tmp_path):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MOLMO2_ERROR_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(answering, "opened", lambda *_: pytest.fail("looked again"))
    answering.check_answering(tmp_path, ParallelConfig(), Shown())


def test_processes_that_are_there_and_the_replicas_asked_for(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert layout_of(["parallel.tensor=2"]).data == 2 == layout_of(["parallel.tensor=2", "parallel.data=2"]).data
    with pytest.raises(UserError, match="parallel.data=3: the 4 processes that are there hold 2 replicas of 2"):
        layout_of(["parallel.tensor=2", "parallel.data=3"])


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        ("evaluation.frames=1000000", "evaluation.frames=1000000: a film of so many frames takes more than the 4,096"),
        ("evaluation.max_new_tokens=9999", "evaluation.max_new_tokens=9999: such an answer takes more than the 4,096"),
        ("evaluation.depths=400", "evaluation: task needle: 400 depths in haystacks of 8 frames"),
    ],
)
def test_what_a_run_evaluates(setting, seen):
    words = ["recipe=tiny", "stage=sft", "evaluation.tasks=[needle]", "data.video.max_frames=8", setting]
    (said,) = evaluation_problems(compose(words))
    assert said.startswith(seen)
    assert not list(evaluation_problems(compose(words[:-1])))
