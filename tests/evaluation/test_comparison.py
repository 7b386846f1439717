"""`molmo2 evaluate --compare`: figures that are not of the same questions, or asked otherwise, are told apart."""

from __future__ import annotations

import base64
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.cli.evaluate import left_by_interrupt, replaced
from molmo2_nemo.cli.main import main
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.results import comparison, result_of, table, write_result
from molmo2_nemo.evaluation.suite import chosen
from molmo2_nemo.rundir.card import scores

SETTINGS = {"frames": None, "max_new_tokens": 32, "temperature": 0.0}


def line(number: int, value: float = 1.0, **more: Any) -> dict[str, Any]:
    place = {"item": number, "place": 0, "key": f"r{number}", "tags": {}, "question": "?", "answer": "a"}
    return place | {"references": ["a"], "scores": {"anls": {"value": value}}, "remarks": [], **more}


def compared(folder: Path, capsys: pytest.CaptureFixture[str], **models: Any) -> list[str]:
    """The lines below the table of models, each of lines and settings."""
    for name, (lines, settings) in models.items():
        write_result(folder / name, result_of("docvqa", "image QA", lines, SETTINGS | settings), lines)
    assert main(["evaluate", "--compare", *(str(folder / name) for name in models)]) == 0
    return capsys.readouterr().out.splitlines()[3:]


def test_the_same_questions_need_no_remark(tmp_path, capsys):
    lines = [line(0), line(1)]
    assert not compared(tmp_path, capsys, a=(lines, {}), b=([line(0), line(1, 0.5)], {"checkpoint": "step=9"}))


def test_other_questions_are_said(tmp_path, capsys):
    other = [line(0), line(1, references=["b"])]
    found = compared(tmp_path, capsys, a=([line(0), line(1)], {}), b=(other, {}))
    assert found == ["docvqa: not the same questions or references (2 of a; 2 of b)"]
    found = compared(tmp_path, capsys, a=([line(0)], {"limit": 1}), b=([line(0), line(1)], {}))
    assert found == ["docvqa: not the same questions or references (1 of a; 2 of b)"]
    both = ([line(0)], {})
    found = compared(tmp_path, capsys, a=both, b=([line(0, references=["b"])], {}), c=both)
    assert found == ["docvqa: not the same questions or references (1 of a, c; 1 of b)"]


def test_settings_and_losses_are_said(tmp_path, capsys):
    lost = [line(0, 0.0, failed="no such file"), line(1, scores={}, unscored="no number")]
    found = compared(tmp_path, capsys, a=([line(0), line(1)], {"fps": 4.0}), b=(lost, {"max_new_tokens": 8}))
    assert found == [
        "docvqa: max_new_tokens is not the same (a 32, b 8)",
        "docvqa: fps is not the same (a 4.0, b -)",
        "docvqa: questions that could not be asked and count 0: a 0, b 1",
        "docvqa: questions that have no usable reference: a 0, b 1",
    ]


def test_results_of_another_task_have_no_remark(tmp_path, capsys):
    write_result(tmp_path / "a", result_of("ai2d", "image QA", [line(0)], SETTINGS), [line(0)])
    write_result(tmp_path / "b", result_of("docvqa", "image QA", [line(5)], SETTINGS), [line(5)])
    assert main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("other", ["a/", "./a", "b/../a"])
def test_a_folder_beside_itself(tmp_path, capsys, monkeypatch, other):
    write_result(tmp_path / "a", result_of("docvqa", "image QA", [line(0)], SETTINGS), [line(0)])
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--compare", "a", other]) == 2
    assert "name two or more stages, runs, or folders of results, each once" in capsys.readouterr().err


def test_a_checkpoint_without_results(tmp_path, capsys):
    """An imported one lies in no run, and its results where --out says."""
    alone, own = tmp_path / "alone", tmp_path / "run" / "sft" / "checkpoints" / "step=3"
    for folder in (alone, own):
        (folder / "weights").mkdir(parents=True)
    (tmp_path / "run" / "sft" / "config.yaml").write_text("")
    assert main(["evaluate", "--compare", str(alone), str(own)]) == 2
    first = f"{alone}: no results there; first `molmo2 evaluate {alone} --tasks ... --out DIR`, and name DIR here, as"
    assert f"{first} it lies in no run\n" in capsys.readouterr().err
    assert main(["evaluate", "--compare", str(own), str(alone)]) == 2
    assert f"{own}: no results there; first `molmo2 evaluate {own} --tasks ...`\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--compare", "a", "b", "--tasks", "needle"], "--compare evaluates nothing, so --tasks has no effect"),
        (["--compare", "a", "b", "--max-crops", "3"], "--max-crops has no effect"),
        (["--list", "a"], "--list evaluates nothing, so a has no effect"),
        (["--list", "--limit", "3"], "--limit has no effect"),
    ],
)
def test_options_without_effect_are_refused(capsys, words, seen):
    assert main(["evaluate", *words]) == 2
    said = capsys.readouterr()
    assert seen in said.err and not said.out


def test_the_first_that_was_lost_is_shown_with_why():
    lines = [line(0), line(1, 0.0, failed="no such\nfile"), line(2, scores={}, unscored="no number")]
    said = table([result_of("docvqa", "image QA", lines, SETTINGS)]).splitlines()[-3:]
    assert said == [
        "docvqa: 1 of 3 questions could not be asked and count 0, the first: r1: no such",
        "  file",
        "docvqa: 1 of 3 questions have no usable reference, the first: r2: no number",
    ]


def test_a_card_has_the_settings_that_were_chosen(tmp_path):
    """What is null was left as the run has it: nothing that the run's files do not say."""
    folder = tmp_path / "evaluation" / "step=3"
    write_result(folder, result_of("docvqa", "image QA", [line(0)], SETTINGS), [line(0)])
    (folder / "needle_map.json").write_text(json.dumps({"maps": []}))
    assert scores(tmp_path) == {
        "step=3": {
            "docvqa": {
                "group": "image QA",
                "questions": 1,
                "failed": 0,
                "unscored": 0,
                "score": 1.0,
                "mixed": False,
                "scores": {"anls": 1.0},
                "answers": {"anls": 1},
                "settings": {"max_new_tokens": 32, "temperature": 0.0},
            }
        }
    }


def test_a_result_that_is_replaced_by_one_of_other_questions(tmp_path):
    old = result_of("held", "own data", [line(0), line(1)], SETTINGS)
    write_result(tmp_path, old, [line(0), line(1)])
    again = result_of("held", "own data", [line(0, 0.5), line(1)], SETTINGS)
    other = result_of("held", "own data", [line(7)], SETTINGS)
    assert replaced(tmp_path, again) == []
    assert replaced(tmp_path, other) == [
        f"{tmp_path}/held.json: a result over 2 other questions was there, and is replaced"
    ]
    (tmp_path / "held.json").write_text("{")
    assert replaced(tmp_path, other) == [f"{tmp_path}/held.json: a damaged result was there, and is replaced"]


def test_own_data_with_the_name_of_a_task_beside_it():
    with pytest.raises(UserError, match="mine/needle: its results get the folder's name, which the task needle has"):
        chosen(["needle", "auto"], "mine/needle")
    assert [task.name for task in chosen(["needle", "auto"], "mine/held")] == ["needle", "held"]


def test_many_models_and_tasks_fit_into_80_columns(tmp_path, capsys):
    """Every figure is in one of the tables, under its model's head; names too long for a head stand below."""
    tasks = [f"longvideobench_subtitles@{frames}" for frames in (128, 384)]
    names = [f"step={1000 * n}" for n in range(14)] + ["a_run_whose_name_is_much_too_long_for_a_column"]
    runs = {
        name: [
            {"task": task, "group": "long video QA", "settings": {}, "score": (10 * m + t) / 1000}
            for t, task in enumerate(tasks)
        ]
        for m, name in enumerate(names)
    }
    lines = comparison(runs).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines.pop() == f"[15] {names[-1]}"
    found: dict[tuple[str, str], str] = {}
    for block in "\n".join(lines).split("\n\n"):
        head, group, *rows = block.splitlines()
        assert group.startswith("long video QA") and len(rows) == len(tasks)
        for row in rows:
            task, *values = row.split()
            found |= {(task, name): value for name, value in zip(head.split(), values, strict=True)}
    heads = [*names[:-1], "[15]"]
    assert found == {
        (task, name): f"{(10 * m + t) / 10:.1f}" for m, name in enumerate(heads) for t, task in enumerate(tasks)
    }


def test_what_is_said_of_many_models_is_wrapped():
    runs = {f"step={n}": [result_of("docvqa", "image QA", [line(n)], SETTINGS)] for n in range(20)}
    said = comparison(runs).split("docvqa: not the same questions or references")[1]
    assert said.count("\n  ") >= 3 and max(map(len, comparison(runs).splitlines())) <= 80
    assert " ".join(said.split()) == "(" + "; ".join(f"1 of step={n}" for n in range(20)) + ")"


def test_remarks_that_differ_in_numbers_are_one_with_their_range():
    cut = "images after the first 5, left out (data.image.max_images=5)"
    remarks = [f"3 {cut}", f"1,200 {cut}", "the answer is cut off after 8 tokens", "half of {it} at 0.5 s", f"7 {cut}"]
    lines = [line(n, remarks=[remark]) for n, remark in enumerate(remarks)]
    lines.append(line(9, remarks=["the answer is cut off after 8 tokens"]))
    assert result_of("docvqa", "image QA", lines, SETTINGS)["remarks"] == {
        f"3 to 1,200 {cut}": 3,
        "the answer is cut off after 8 tokens": 2,
        "half of {it} at 0.5 s": 1,
    }


def test_two_that_write_one_task_at_once_do_not_mix(tmp_path, monkeypatch):
    """The figures are those of the answers beside them."""
    import threading
    import time

    from molmo2_nemo.evaluation import results

    write, order = results.atomic, []

    @contextmanager
    def slowly(path: Path) -> Iterator[Path]:
        with write(path) as part:
            yield part
        order.append(threading.current_thread().name)
        time.sleep(0.2)

    monkeypatch.setattr(results, "atomic", slowly)

    def one(count: int) -> None:
        lines = [line(n) for n in range(count)]
        write_result(tmp_path, result_of("docvqa", "image QA", lines, SETTINGS | {"limit": count}), lines)

    threads = [threading.Thread(target=one, args=(count,), name=str(count)) for count in (3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == 6 and all(order[n] == order[n + 1] for n in (0, 2, 4))
    answers = (tmp_path / "docvqa.jsonl").read_text().splitlines()
    assert json.loads((tmp_path / "docvqa.json").read_text())["questions"] == len(answers) == int(order[-1])


@pytest.mark.parametrize(("room", "named"), [(3000, "docvqa.jsonl"), (900, "docvqa-1-0.jpg")])
def test_a_disk_without_room_leaves_the_result_before(tmp_path, room, named):
    """All of its files, or none: answers, pictures and figures are of one evaluation."""

    def of(count: int) -> list[dict[str, Any]]:
        pictures = [base64.b64encode(b"x" * 500 * (n + 1)).decode() for n in range(count)]
        return [line(n) | {"picture": picture} for n, picture in enumerate(pictures)]

    write_result(tmp_path, result_of("docvqa", "image QA", of(1), SETTINGS), of(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    lines = [one | {"answer": "y" * 2000} for one in of(2)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # the system then refuses to write more, as to a disk
    try:
        with pytest.raises(OSError) as error:
            write_result(tmp_path, result_of("docvqa", "image QA", lines, SETTINGS), lines)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / named)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_result(tmp_path, result_of("docvqa", "image QA", lines, SETTINGS), lines)
    assert json.loads((tmp_path / "docvqa.json").read_text())["questions"] == 2


def test_less_than_there_is(tmp_path):
    """Before a pass with --limit is run."""
    from types import SimpleNamespace

    from molmo2_nemo.cli.evaluate import fewer

    write_result(tmp_path, result_of("docvqa", "image QA", [line(0)], SETTINGS | {"limit": None}), [line(0)])
    few: Any = SimpleNamespace(name="docvqa", count=3, items=range(8))
    path = tmp_path / "docvqa.json"
    said = f"{path} is over 8 items, and will be replaced by a result over 3; --out DIR keeps both"
    assert fewer(tmp_path, few) == [said]
    for name, count in (("docvqa", 8), ("chartqa", 3)):
        assert fewer(tmp_path, SimpleNamespace(name=name, count=count, items=range(8))) == []
    write_result(tmp_path, result_of("docvqa", "image QA", [line(0)], SETTINGS | {"limit": 3}), [line(0)])
    assert fewer(tmp_path, few) == []


def test_what_an_interrupted_evaluation_leaves():
    from types import SimpleNamespace

    names = ["chartqa", "needle@8", "needle@16"]
    asked: Any = SimpleNamespace(out=Path("runs/a/evaluation"))
    assert left_by_interrupt(asked, names, 0, []) == "interrupted: of chartqa, needle@8, needle@16 nothing is kept"
    said = "interrupted: chartqa, needle@8 are in runs/a/evaluation; of needle@16 nothing is kept"
    assert left_by_interrupt(asked, names, 2, []) == said
    said = "interrupted: chartqa is in runs/a/evaluation; of needle@8 the answers so far are kept, from which the same "
    said += "command goes on; of needle@16 nothing is kept"
    assert left_by_interrupt(asked, names, 1, ["needle@8"]) == said
