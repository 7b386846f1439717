"""`molmo2 evaluate`: every question is scored once under any layout, and what cannot be asked counts as wrong."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.convert import import_checkpoint
from molmo2_nemo.data.shard_writer import write_shards
from tests.convert.test_parity import tiny_folder
from tests.support.pool import start_megatron

QA = {"style": "user_qa", "question": "Which animal?", "answer": "a cat"}
RECORDS: list[list[dict[str, Any]]] = [
    [QA, {"style": "vqa2", "question": "Colour?", "answers": ["red", "red", "red", "blue"]}],
    [{"style": "a_okvqa_mc", "question": "Which?", "options": ["a dog", "a cat"], "answer_idx": 1}],
    [{"style": "user_qa", "turns": [QA, {"question": "And now?", "answer": "a dog"}]}],
    [{"style": "user_qa", "messages": ["Hi.", "Hello.", "Bye.", "Goodbye."]}],
    [{"either": [{"question": "One?", "answer": "1"}, {"question": "Two?", "answer": "2"}], "style": "tally_qa"}],
]
QUESTIONS = [2, 1, 2, 2, 1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return import_checkpoint(tiny_folder(folder / "hf"), folder / "megatron")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held") / "held"
    records = [(f"r{n}", {"json": json.dumps({"annotations": tree}).encode()}) for n, tree in enumerate(RECORDS)]
    cut = json.dumps({"annotations": [QA], "images": ["png"]}).encode()
    write_shards(folder, [*records, ("cut", {"json": cut, "png": b"\x89PNG\r\n\x1a\nnothing more"})])
    return folder


def evaluated(call: list[str], layout: dict[str, int]) -> tuple[int, str, str]:
    """Job: the verb on this rank; exit code and what it printed."""
    start_megatron(**layout)
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as wrong:
        return main(call), said.getvalue(), wrong.getvalue()


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "held.jsonl").read_text().splitlines()]


def call(checkpoint: Path, data: Path, out: Path) -> list[str]:
    return ["evaluate", str(checkpoint), "--data", str(data), "--max-new-tokens", "4", "--out", str(out)]


@pytest.fixture(scope="module")
def alone(workers, checkpoint, data, tmp_path_factory) -> Iterator[tuple[Path, str]]:
    out = tmp_path_factory.mktemp("alone")
    code, said, wrong = workers.run(evaluated, call(checkpoint, data, out), {})[0]
    assert code == 0, wrong
    yield out, said


def test_every_turn_of_every_annotation_is_a_question(alone):
    lines = [json.loads(line) for line in (alone[0] / "held.jsonl").read_text().splitlines()]
    asked = [line for line in lines if "failed" not in line]
    assert [sum(line["item"] == item for line in asked) for item in range(6)] == [*QUESTIONS, 0]
    assert len({line["key"] for line in lines}) == len(lines) == sum(QUESTIONS) + 1
    by_key = {line["key"].split(":")[1]: line for line in asked}
    assert by_key["r0/1"]["references"] == ["red", "red", "red", "blue"] and "vqa_accuracy" in by_key["r0/1"]["scores"]
    choice = {"option": "B", "options": ["a dog", "a cat"], "unlabelled": False}
    assert by_key["r1/0"]["references"] == [choice] and "multiple_choice" in by_key["r1/0"]["scores"]
    assert by_key["r2/0/1"]["question"] == "And now?" and by_key["r2/0/1"]["references"] == ["a dog"]
    assert by_key["r3/0/1"]["question"] == "Bye." and by_key["r3/0/1"]["references"] == ["Goodbye."]
    assert by_key["r4/0"]["references"] == ["1"] and "counting" in by_key["r4/0"]["scores"]


def test_what_cannot_be_read_is_counted_and_named(alone):
    (failed,) = [line for line in map(json.loads, (alone[0] / "held.jsonl").open()) if "failed" in line]
    assert "cut" in failed["failed"] and failed["answer"] == ""
    result = json.loads((alone[0] / "held.json").read_text())
    assert result["failed"] == 1 and result["questions"] == sum(QUESTIONS) + 1 and result["group"] == "own data"
    first = [next(iter(line["scores"].values()))["value"] for line in lines_of(alone[0]) if line["scores"]]
    assert len(first) == 8 and result["mixed"] and result["score"] == pytest.approx(sum(first) / 9)
    (row,) = [line.split() for line in alone[1].splitlines() if "all questions" in line]
    assert row == ["all", "questions", "9", f"{100 * sum(first) / 9:.1f}", "%"]
    assert "held: 1 of 9 questions could not be asked and count 0" in alone[1]
    assert "held: 8 of 9 answers: the answer is cut off after 4 tokens" in alone[1]
    assert set(result["scores"]) == {"exact_match", "vqa_accuracy", "multiple_choice", "counting"}


@pytest.mark.parametrize(
    ("settings", "layout", "ranks"),
    [
        (["parallel.data=2"], {}, 2),
        (["parallel.data=4"], {}, 4),  # six items: two ranks have two, two have one
        (["parallel.tensor=2", "parallel.data=2"], {"tensor": 2}, 4),
        (["parallel.context=2"], {"context": 2}, 2),
    ],
)
def test_the_same_lines_under_every_layout(workers, alone, checkpoint, data, tmp_path, settings, layout, ranks):
    told = workers.run(evaluated, [*call(checkpoint, data, tmp_path), *settings], layout, ranks=ranks)
    assert [code for code, *_ in told] == [0] * ranks
    assert [bool(said) for _, said, _ in told] == [True] + [False] * (ranks - 1)
    for name in ("held.jsonl", "held.json"):
        assert (tmp_path / name).read_bytes() == (alone[0] / name).read_bytes()


def test_only_the_first_items(workers, checkpoint, data, tmp_path):
    code, *_ = workers.run(evaluated, [*call(checkpoint, data, tmp_path), "--limit", "3"], {})[0]
    lines = [json.loads(line) for line in (tmp_path / "held.jsonl").open()]
    assert code == 0 and len(lines) == sum(QUESTIONS[:3])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", "auto"], "the task auto and the data belong together"),
        (["--data", "DATA", "--tasks", "aoto"], "unknown task 'aoto'"),
        (["--tasks", "auto,auto", "--data", "DATA"], "name tasks, each once"),
        ([], "no tasks: name some (molmo2 evaluate --list shows them), or shards with --data DIR"),
        (["--data", "nowhere"], "no folder at nowhere"),
        (["--data", "DATA", "--frames", "8,x"], "--frames 8,x: numbers of frames above 0"),
        (["--data", "DATA", "--frames", "8,8"], "each once"),
        (["--data", "DATA", "--frames", "²"], "--frames ²: numbers of frames above 0"),
        (["--data", "DATA", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--data", "DATA", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--data", "DATA", "--frames", "9" * 5000], "numbers of frames above 0"),
        (["--data", "DATA", "--frames", "8,1000000"], "--frames 1000000: a film of so many frames takes more than the"),
        (["--data", "DATA", "--fps", "1e9"], "--fps 1e+09: one second of film would be more than the 4,096 positions"),
        (["--data", "DATA", "--max-crops", "100000"], "which are room for 599 tiles"),
        (["--data", "DATA", "--max-new-tokens", "5000"], "--max-new-tokens 5000: such an answer takes more than the"),
        (
            ["--tasks", "needle", "--frames", "20", "--depths", "50"],
            "50 depths in haystacks of 20 frames",
        ),
        (["--tasks", "needle", "--fps", "0.001"], "more than the 21600 s of data.limits.video_seconds"),
        (["--tasks", "needle", "--fps", "150"], "films of 150 frames a second; at most 100 can be drawn"),
        (["--data", "DATA", "parallel.context=3"], "parallel.context=3 ranks would shard the 4 query heads and 2 key"),
        (["--data", "DATA", "parallel.context=2", "parallel.context_ulysses=3"], "does not divide parallel.context=2"),
        (["--data", "DATA", "parallel.tensor=0"], "parallel.tensor=0"),
        (["--data", "DATA", "another"], "name one checkpoint, stage or run to evaluate, not 2"),
        (["--data", "DATA", "parallel.pipeline=2"], "pipeline stages cannot generate"),
        (["--data", "DATA", "parallel.sequence=true"], "parallel.sequence needs parallel.tensor"),
        (["--data", "DATA", "parallel.tensr=2"], "tensr"),
        (["--data", "DATA", "stage=sft"], "here only the layout can be set"),
    ],
)
def test_bad_input_is_one_line(checkpoint, data, capsys, words, expected):
    words = [str(data) if word == "DATA" else word for word in words]
    assert main(["evaluate", str(checkpoint), *words]) == 2
    said = capsys.readouterr()
    assert expected in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("words", [[], ["parallel.data=2"]])
def test_a_place_that_cannot_be_written_is_said_before_the_model_loads(checkpoint, data, tmp_path, capsys, words):
    (tmp_path / "file").write_text("")
    call = ["evaluate", str(checkpoint), "--data", str(data), "--out"]
    assert main([*call, str(tmp_path / "file" / "out"), *words]) == 2
    assert "file is a file; name a folder" in capsys.readouterr().err
    assert main([*call, "/proc/out", *words]) == 2
    assert capsys.readouterr().err.startswith("molmo2: error: --out /proc/out: ")


def test_the_list_of_tasks_has_80_columns(capsys):
    from molmo2_nemo.evaluation.tasks import task_names

    assert main(["evaluate", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "} == set(task_names())


def test_a_folder_that_is_no_checkpoint(tmp_path, data, capsys):
    assert main(["evaluate", str(tmp_path / "none"), "--data", str(data)]) == 2
    assert "no such checkpoint or run folder" in capsys.readouterr().err


def test_models_side_by_side(tmp_path, capsys):
    for name, value in (("a", 0.25), ("b", 0.5)):
        (tmp_path / name).mkdir()
        for task, group in (("one", "image QA"), ("two", "image QA"), ("three", "caption")):
            if (name, task) == ("a", "two"):
                continue
            scores = {"anls": {"score": value, "answers": 4}}
            result = {"task": task, "group": group, "settings": {}, "scores": scores}
            (tmp_path / name / f"{task}.json").write_text(json.dumps(result))
    assert main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["a", "b"]
    # the group's mean is over what both have: `two` does not count
    assert rows == [
        ["caption", "25.0", "50.0"],
        ["three", "25.0", "50.0"],
        ["image", "QA", "25.0", "50.0"],
        ["one", "25.0", "50.0"],
        ["two", "-", "50.0"],
    ]
    assert main(["evaluate", "--compare", str(tmp_path / "a")]) == 2
    assert "two or more" in capsys.readouterr().err
