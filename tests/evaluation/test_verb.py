"""`molmo2 generate --score`: a tiny model's answers, scored by a scorer of ours and by one that a single file adds."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.convert import import_checkpoint
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation import scorers
from molmo2_nemo.evaluation.scoring import Scoring
from tests.convert.test_parity import tiny_folder

MADE = '''"""Short answers are good."""
from molmo2_nemo.evaluation.base import Score, Scorer

class Short(Scorer):
    name = "short"
    title = "one over the length and one"

    def score(self, prediction, references):
        return Score(1 / (1 + len(prediction)), {"length": len(prediction)})

    def aggregate(self, scores):
        return min(score.value for score in scores)

SCORER = Short()
'''


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return import_checkpoint(tiny_folder(folder / "hf"), folder / "megatron")


def write_prompts(folder: Path, *answers: Any) -> Path:
    lines = [json.dumps({"question": "What is this?", "answer": answer}) for answer in answers]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder / "prompts.jsonl"


def scored(folder: Path, call: list[str]) -> tuple[int, str]:
    """Job: the verb, with a scorer that lies in `folder`; exit code and what it printed."""
    scorers.__path__.append(str(folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            return main(call), said.getvalue()
    finally:
        scorers.__path__.remove(str(folder))
        sys.modules.pop(f"{scorers.__name__}.short", None)


def test_a_scorer_is_one_file(workers, checkpoint, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "short.py").write_text(MADE)
    prompts, out = write_prompts(tmp_path, "A cat.", ["a", "b"]), tmp_path / "answers.jsonl"
    call = ["generate", str(checkpoint), str(prompts), "--max-new-tokens", "3", "--out", str(out)]
    code, said = workers.run(scored, made, [*call, "--score", "short,exact_match"])[0]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and [line["reference"] for line in lines] == ["A cat.", ["a", "b"]]
    lengths = [len(line["answer"]) for line in lines]
    assert [line["scores"]["short"] for line in lines] == [{"value": 1 / (1 + n), "length": n} for n in lengths]
    assert [line["scores"]["exact_match"]["value"] for line in lines] == [0, 0]  # an untrained model
    assert f"score     short {1 / (1 + lengths[0]):.2f}  exact_match 0.00" in said
    title, short, exact = said.splitlines()[-3:]
    assert title.split() == ["scorer", "answers", "score"]
    assert short.split()[:4] == ["short", "2", f"{100 / (1 + max(lengths)):.1f}", "%"]
    assert exact.split()[:4] == ["exact_match", "2", "0.0", "%"]


def test_references_of_points_and_moments(workers, checkpoint, tmp_path):
    """An untrained model answers with no points: right where there are none to find."""
    prompts = write_prompts(tmp_path, {"points": [], "size": [90, 60]}, [{"points": [[30, 20]], "size": [90, 60]}])
    call = ["generate", str(checkpoint), str(prompts), "--max-new-tokens", "3", "--score", "pointing"]
    code, said = workers.run(scored, tmp_path, call)[0]
    assert code == 0 and said.count("score     pointing 1.00") == said.count("score     pointing 0.00") == 1
    assert 'reference {"points": [], "size": [90, 60]}' in said
    assert said.splitlines()[-1].split()[:4] == ["pointing", "2", "50.0", "%"]


@pytest.mark.parametrize(
    ("names", "answers", "expected"),
    [
        ("exact_mach", ["x"], "unknown scorer 'exact_mach'; did you mean 'exact_match'?"),
        ("", ["x"], "'': name scorers, each once"),
        (" anls , exact_mach", ["x"], "unknown scorer 'exact_mach'"),
        ("counting", ["3", "a cat"], "prompt 2: counting: the reference 'a cat' has no number"),
        ("anls,anls", ["x"], "'anls,anls': name scorers, each once"),
        ("anls", ["x", None], "prompts.jsonl: prompt 2 has no reference answer to score against"),
        ("anls", [[]], "prompts.jsonl: prompt 1 has no reference answer"),
        ("anls", ["  "], "prompts.jsonl: prompt 1 has no reference answer"),
        ("vqa_accuracy", [["a", "b"]], "prompt 1 has 2 reference answers, but vqa_accuracy needs 3 or more"),
        ("anls", [["a", 7]], "answer is ['a', 7]; expected a text, an object that a scorer reads, or a list of them"),
        ("pointing", [{}], "prompt 1 has no reference answer"),
        ("pointing", [{"size": [9, 9]}], "prompt 1: "),
        ("pointing", ["a cat"], "prompt 1: "),
        ("anls", [{"points": [[1, 2]], "size": [9, 9]}], "prompt 1: "),
    ],
)
def test_what_cannot_be_scored_is_said_before_the_model_loads(names, answers, expected, checkpoint, tmp_path, capsys):
    prompts = write_prompts(tmp_path, *answers)
    assert main(["generate", str(checkpoint), str(prompts), "--score", names]) == 2
    said = capsys.readouterr()
    assert expected in said.err and not said.out


def test_records_have_one_reference_each(checkpoint, tmp_path, capsys):
    assert main(["generate", str(checkpoint), "--data", str(tmp_path), "--score", "anls,vqa_accuracy"]) == 2
    expected = "a record of --data has 1 reference answer, but vqa_accuracy needs 3 or more"
    assert expected in capsys.readouterr().err


def test_the_help_names_every_scorer(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in scorers.scorer_names())


def test_a_reference_that_a_scorer_cannot_use_names_the_answer():
    with pytest.raises(UserError, match="record 7: counting: the reference 'many' has no number"):
        Scoring(["counting"]).score("record 7", "3", "many")


def test_no_answers_have_no_figure():
    assert Scoring(["anls"]).table().splitlines()[1].split()[:3] == ["anls", "0", "-"]
