"""`generate`, `ask` and `evaluate` on several ranks say what one process says; what ends a rank is said once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.convert import import_checkpoint
from tests.convert.test_parity import tiny_folder
from tests.evaluation.test_run import evaluated
from tests.support.thorough import thorough

QUESTIONS = 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return import_checkpoint(tiny_folder(folder / "hf"), folder / "megatron")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [json.dumps({"question": "What? " * (n + 1), "answer": str(n)}) for n in range(QUESTIONS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return tmp_path / "prompts.jsonl"


@pytest.mark.parametrize(
    ("words", "layout", "ranks"),
    [
        (["parallel.data=2"], {}, 2),
        (["parallel.tensor=2", "parallel.data=2"], {"tensor": 2}, 4),
        thorough(["parallel.context=2"], {"context": 2}, 2),
    ],
)
@pytest.mark.parametrize("drawn", [[], ["--temperature", "0.9", "--seed", "3"]], ids=["greedy", "drawn"])
def test_generate_on_ranks(workers, checkpoint, prompts, tmp_path, words, layout, ranks, drawn):
    call = ["generate", str(checkpoint), str(prompts), "--max-new-tokens", "4", "--score", "exact_match", *drawn]
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    alone = workers.run(evaluated, [*call, "--out", str(one)], {})[0]
    told = workers.run(evaluated, [*call, "--out", str(several), "--layout", *words], layout, ranks=ranks)
    assert told[0] == alone and alone[0] == 0 and len(one.read_text().splitlines()) == QUESTIONS
    assert told[1:] == [(0, "", "")] * (ranks - 1)
    assert several.read_bytes() == one.read_bytes()


def test_the_command_starts_its_ranks(checkpoint, prompts, tmp_path, capfd):
    """Two processes, as a user starts them; then a folder in the way of the answers, found out by a rank."""
    out = tmp_path / "answers.jsonl"
    call = ["generate", str(checkpoint), str(prompts), "--max-new-tokens", "2", "--layout", "parallel.data=2", "--out"]
    assert main([*call, str(out)]) == 0
    said = capfd.readouterr()
    assert said.out.count("asked") == QUESTIONS and len(out.read_text().splitlines()) == QUESTIONS
    (checkpoint / "molmo2.json").rename(checkpoint / "away")
    (checkpoint / "weights").rename(checkpoint / "gone")
    try:
        assert main([*call, str(out)]) == 2
    finally:
        (checkpoint / "gone").rename(checkpoint / "weights")
        (checkpoint / "away").rename(checkpoint / "molmo2.json")
    said = capfd.readouterr()
    assert said.err.count("molmo2: error:") == 1 and "Traceback" not in said.err


@pytest.mark.parametrize("verb", [["ask", "CKPT", "What?"], ["generate", "CKPT", "PROMPTS"]])
def test_a_layout_that_cannot_answer(checkpoint, prompts, capsys, verb):
    words = [{"CKPT": str(checkpoint), "PROMPTS": str(prompts)}.get(word, word) for word in verb]
    assert main([*words, "--layout", "parallel.pipeline=2"]) == 2
    assert "pipeline stages cannot generate answers" in capsys.readouterr().err
