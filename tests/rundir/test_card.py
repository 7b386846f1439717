"""Cards of the runs that tests/rundir/old_run/ and these tests write: what is there is said, the rest is unknown."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.cli import main as command
from molmo2_nemo.errors import UserError
from molmo2_nemo.rundir.card import loss_digest, run_card, speed, unknown
from molmo2_nemo.rundir.code_state import COMMAND, code_state, commit_of_code

OLD = Path(__file__).parent / "old_run"
RESULT = {
    "task": "chartqa",
    "group": "image QA",
    "settings": {"limit": 10},
    "questions": 10,
    "failed": 1,
    "unscored": 0,
    "remarks": {},
    "scores": {"relaxed_accuracy": {"score": 0.7, "answers": 10, "figures": {}, "by": {}}},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path / "run"


def with_values(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_old_run(run: Path) -> None:
    """It was trained before its command and its data were written down."""
    (stage,) = run_card(run)["stages"]
    lines = [json.loads(line) for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    text = "".join(f"{line['step']} {line['loss']!r}\n" for line in lines)
    assert stage["loss"] == {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "steps": 6,
        "first": lines[0]["loss"],
        "last": lines[-1]["loss"],
        "min": min(line["loss"] for line in lines),
    }
    assert (stage["layout"], stage["steps"], stage["tokens"], stage["seed"]) == ("TP2+SP", 60, 182_111, 6198)
    assert stage["speed"]["tokens_per_second"] == pytest.approx(
        sum(line["tokens"] for line in lines) / sum(line["seconds"] for line in lines)
    )
    assert stage["speed"]["mfu_by_mask_area"] is None and stage["speed"]["tflops_by_mask_area"] > 0
    assert {"command", "commit", "versions", "scores", "speed.mfu_by_mask_area"} <= set(stage["unknown"])
    assert any(name.endswith(".fingerprint") for name in stage["unknown"])
    manifest = run / "sft" / "checkpoints" / "step=60" / "manifest.json"
    assert stage["checkpoint"]["manifest_sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()


def test_what_a_run_writes_down(run: Path) -> None:
    stage = run / "sft"
    code = {"command": "molmo2 train", "commit": "ab12", "modified": False, "versions": {"torch": "2.13.0"}}
    with_values(stage / "attempt.json", code=code)
    (source,) = run_card(run)["stages"][0]["data"]["sources"]
    identity = {"seed": 7, "sources": {source: ["f00d", 40, 1.0]}}
    with_values(stage / "summary.json", data=identity, by_source={source: {"examples": {"count": 988}}})
    results = stage / "evaluation" / "step=60"
    results.mkdir(parents=True)
    (results / "chartqa.json").write_text(json.dumps(RESULT))
    lines = [{"step": step, "tasks": {"chartqa": step / 100}, "groups": {"image QA": step / 100}} for step in (30, 60)]
    (stage / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (card,) = run_card(run)["stages"]
    assert card["groups"] == {"step": 60, "groups": {"image QA": 0.6}}
    assert {name: card[name] for name in code} == code
    assert card["data"]["seed"] == 7
    known = card["data"]["sources"][source]
    assert (known["fingerprint"], known["records"], known["share"], known["examples"]) == ("f00d", 40, 1.0, 988)
    found = card["scores"]["step=60"]["chartqa"]
    assert found["scores"] == {"relaxed_accuracy": 0.7} and (found["questions"], found["failed"]) == (10, 1)
    assert "answers" not in found  # a file without `score`
    assert card["unknown"] == ["speed.mfu_by_mask_area", "validation"]


def test_it_is_the_same_every_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", str(run), "--card"]) == 0
    first = (run / "card.json").read_bytes()
    assert command.main(["report", str(run), "--card", "--out", str(run / "again.json")]) == 0
    assert (run / "again.json").read_bytes() == first
    assert os.environ[COMMAND] == shlex.join(["molmo2", "report", str(run), "--card", "--out", str(run / "again.json")])
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(run / "card.json"), str(run / "again.json")]
    assert "sft: the run's files do not say " in said.err
    shutil.copytree(run, run.parent / "moved" / "run")
    assert run_card(run.parent / "moved" / "run") == json.loads(first)


def test_the_page_of_a_run_holds_its_card(run: Path) -> None:
    def links() -> list[tuple[str, str]]:
        page = (run / "report.html").read_text()
        return re.findall(
            r"<a download=card.json href='data:application/json;base64,([^']+)'>card.json</a>([^<]*)<", page
        )

    assert command.main(["report", str(run)]) == 0 and links() == []
    assert command.main(["report", str(run), "--card"]) == command.main(["report", str(run)]) == 0
    ((held, said),) = links()
    assert base64.b64decode(held) == (run / "card.json").read_bytes() and "changed" not in said
    with_values(run / "sft" / "summary.json", tokens=7)
    for text in (held, base64.b64encode(b"{").decode()):  # of files that have changed; damaged
        (run / "card.json").write_bytes(base64.b64decode(text))
        assert command.main(["report", str(run)]) == 0
        ((_, said),) = links()
        assert f"the run's files have changed since: molmo2 report {run} --card" in html.unescape(said)


def test_a_changed_loss_changes_the_digest() -> None:
    steps = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.25}]
    digest = loss_digest(steps)
    assert digest["sha256"] == hashlib.sha256(b"1 2.5\n2 null\n3 2.25\n").hexdigest()
    assert (digest["first"], digest["last"], digest["min"]) == (2.5, 2.25, 2.25)
    assert loss_digest([*steps[:2], {"step": 3, "loss": 2.2500001}])["sha256"] != digest["sha256"]


def test_speed_is_weighted_with_seconds() -> None:
    steps = [{"tokens": 100, "seconds": 1.0, "mfu": 0.2}, {"tokens": 100, "seconds": 3.0, "mfu": 0.4}]
    found = speed(steps)
    assert found["tokens_per_second"] == 50 and found["mfu_by_mask_area"] == pytest.approx(0.35)
    assert found["tflops_by_mask_area"] is None
    assert speed([]) == dict.fromkeys(found)


def test_names_of_what_is_unknown() -> None:
    assert sorted(unknown({"a": None, "b": {"c": None, "d": 0}, "e": []})) == ["a", "b.c"]


def test_no_stage_is_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "sft" / "summary.json").unlink()
    assert command.main(["report", str(run), "--card"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "finished" in line]
    assert "no stage is finished" in line and "molmo2 status" in line
    assert not (run / "card.json").exists()


def test_a_stage_that_is_not_finished_is_named(run: Path) -> None:
    shutil.copytree(run / "sft", run / "long")
    (run / "long" / "summary.json").unlink()
    assert [(card["stage"], card["state"]) for card in run_card(run)["stages"]] == [
        ("sft", "finished"),
        ("long", "not finished"),
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"scores": 3}'])
def test_results_that_are_none(run: Path, text: str) -> None:
    folder = run / "sft" / "evaluation" / "step=60"
    folder.mkdir(parents=True)
    (folder / "count.json").write_text(text)
    with pytest.raises(UserError, match="count.json is not a result of molmo2 evaluate"):
        run_card(run)


def test_where_it_cannot_be_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", str(run), "--card", "--out", str(run / "nowhere" / "card.json")]) == 2
    assert f"there is no folder {run / 'nowhere'}" in capsys.readouterr().err


def git(folder: Path, *words: str) -> str:
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *author, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_of_a_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    assert commit_of_code(tmp_path) == (None, None)  # nothing is committed
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "First")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of_code(tmp_path) == (commit, False)
    (tmp_path / "code.py").write_text("a = 2\n")
    assert commit_of_code(tmp_path) == (commit, True)


def test_code_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMAND, "molmo2 train recipe=tiny")
    state = code_state()
    assert state["command"] == "molmo2 train recipe=tiny" and state["versions"]["torch"].startswith("2.")
    commit, modified = commit_of_code(tmp_path)
    assert (commit is None) == (modified is None)
