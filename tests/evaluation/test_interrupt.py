"""Ctrl-C in an evaluation: what is written stays, and what is not is named. What is said and written meanwhile."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.cli import evaluate
from molmo2_nemo.cli.generate import write_answers
from molmo2_nemo.cli.main import main
from molmo2_nemo.convert import import_checkpoint
from molmo2_nemo.errors import INTERRUPTED
from molmo2_nemo.launch.ranks import in_rank
from tests.convert.test_parity import tiny_folder
from tests.support.pool import start_megatron


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return import_checkpoint(tiny_folder(folder / "hf"), folder / "megatron")


def interrupted(call: list[str], after: int, together: int = 64, **layout: int) -> tuple[int, str, str]:
    """Job: the verb, interrupted when it makes the example of a question behind so many.

    Args:
        together: prompts that are answered at once.
    """
    from molmo2_nemo.inference import generate
    from molmo2_nemo.inference.seen import SeenMedia

    start_megatron(**layout)
    before, generate.TOGETHER = generate.TOGETHER, (together, generate.TOGETHER[1])
    made, example = 0, SeenMedia.example

    def counted(*args: Any) -> Any:
        nonlocal made
        made += 1
        if made > after:
            raise KeyboardInterrupt
        return example(*args)

    SeenMedia.example = counted  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as wrong:
            return main(call), said.getvalue(), wrong.getvalue()
    finally:
        generate.TOGETHER = before
        SeenMedia.example = example  # type: ignore[method-assign]


def test_what_is_written_stays_and_the_command_goes_on(workers, checkpoint, tmp_path):
    call = ["evaluate", str(checkpoint), "--tasks", "needle", "--frames", "3,4", "--depths", "1", "--limit", "1"]
    call += ["--max-new-tokens", "2", "--out", str(tmp_path)]
    code, said, wrong = workers.run(interrupted, call, 8)[0]
    assert code == INTERRUPTED and not said
    expected = f"warning: interrupted: needle@3 is in {tmp_path}; of needle@4 nothing is kept\ninterrupted\n"
    assert wrong == expected
    assert {path.stem for path in tmp_path.glob("*.json")} == {"needle@3", "needle_map"}
    assert not list(tmp_path.glob(".*.part"))
    code, said, wrong = workers.run(interrupted, call, 12)[0]
    assert (code, wrong) == (0, "")
    results = [json.loads((tmp_path / f"needle@{frames}.json").read_text()) for frames in (3, 4)]
    assert [result["questions"] for result in results] == [6, 6]
    assert "\nmedia: 2 decoded, for 10 further questions not again\n" in said
    assert "\ncrops: 7 encoded, 35 of earlier questions not again\n" in said


def test_a_task_goes_on_from_the_answers_that_are_kept(workers, checkpoint, tmp_path):
    """Also under another layout; the result is that of a command that was not interrupted, to the byte. Under other
    settings every question is asked."""
    call = ["evaluate", str(checkpoint), "--tasks", "needle", "--frames", "3", "--depths", "2", "--limit", "4"]
    settings = ["--max-new-tokens", "3"]
    folders = [tmp_path / name for name in ("whole", "alone", "ranks", "other")]
    code, said, wrong = workers.run(interrupted, [*call, *settings, "--out", str(folders[0])], 99)[0]
    assert code == 0 and "earlier command" not in said
    for folder in folders[1:]:
        code, said, wrong = workers.run(interrupted, [*call, *settings, "--out", str(folder)], 9, 2)[0]
        expected = "interrupted: of needle@3 the answers so far are kept, from which the same command goes on"
        assert code == INTERRUPTED and not said and wrong == f"warning: {expected}\ninterrupted\n"
        (kept,) = folder.glob(".needle@3.*.answers")
        assert len(kept.read_text().splitlines()) == 8 and list(folder.iterdir()) == [kept]
    with kept.open("a") as file:
        file.write('{"asked": "cut o')  # a process that was killed
    code, said, wrong = workers.run(interrupted, [*call, *settings, "--out", str(folders[1])], 16)[0]
    line = "needle@3: 8 of 24 answers are those of an earlier command (of the same"
    assert (code, wrong) == (0, "") and f"\n{line}" in said
    told = workers.run(interrupted, [*call, *settings, "--out", str(folders[2]), "parallel.data=2"], 16, ranks=2)
    assert [code for code, *_ in told] == [0, 0] and f"\n{line}" in told[0][1]
    code, said, wrong = workers.run(interrupted, [*call, "--max-new-tokens", "2", "--out", str(folders[3])], 24)[0]
    assert (code, wrong) == (0, "") and "earlier command" not in said
    for folder in folders[1:]:
        assert not list(folder.glob(".*answers*"))
    names = ("needle@3.json", "needle@3.jsonl", *(f"needle@3-{item}-0.jpg" for item in range(4)))
    for folder in folders[1:3]:
        assert all((folder / name).read_bytes() == (folders[0] / name).read_bytes() for name in names)


def test_answers_that_cannot_be_written_are_shown(workers, checkpoint, tmp_path):
    (tmp_path / "needle@4.json").mkdir()
    call = ["evaluate", str(checkpoint), "--tasks", "needle", "--frames", "3,4,5", "--depths", "1", "--limit", "1"]
    code, said, wrong = workers.run(interrupted, [*call, "--max-new-tokens", "2", "--out", str(tmp_path)], 99)[0]
    assert code == 2 and wrong.startswith(f"molmo2: error: --out {tmp_path}: ") and wrong.count("\n") == 1
    assert [line.split()[0] for line in said.splitlines()[1:3]] == ["needle@3", "needle@4"]
    assert (tmp_path / "needle@3.json").is_file() and not (tmp_path / "needle@5.json").exists()


def test_a_log_says_how_far_a_task_is(monkeypatch, capsys):
    for seconds, expected in ((3600.0, ""), (0.0, "docvqa: item 1 of 2,000\ndocvqa: item 1,200 of 2,000\n")):
        monkeypatch.setattr(evaluate, "LOGGED", seconds)
        for shown in (True, False):  # the first rank, and another
            with evaluate.progress("docvqa", 2000, shown) as advance:
                advance(0)
                advance(1199)
            assert capsys.readouterr().err == (expected if shown else "")


def test_an_answer_is_in_the_file_as_soon_as_it_is_there(tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    out.write_text("of an earlier call\n")

    def answered() -> Iterator[dict[str, Any]]:
        for number in range(3):
            yield {"key": f"prompt {number}", "question": "What?", "answer": "ein Käse"}
            keys = [json.loads(line)["key"] for line in out.read_text(encoding="utf-8").splitlines()]
            assert keys == [f"prompt {n}" for n in range(number + 1)]

    write_answers(answered(), out, None)
    assert capsys.readouterr().out.count("ein Käse") == 3 and '"ein Käse"' in out.read_text(encoding="utf-8")


def test_one_of_several_ranks_says_that_it_is_interrupted(monkeypatch):
    def work() -> int:
        raise KeyboardInterrupt

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert in_rank(work) == INTERRUPTED
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(KeyboardInterrupt):
        in_rank(work)
