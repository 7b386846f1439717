"""Caption tasks and QVHighlights, from made files in the published layout to the tiny model's figures."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.convert import import_checkpoint
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.task import TaskSettings
from molmo2_nemo.evaluation.tasks import find_task
from tests.convert.test_parity import tiny_folder
from tests.support.films import film
from tests.support.judge_server import Server
from tests.support.pool import start_megatron

CAPTIONS = ["A cat looks up. It is grey.", "A dog runs."]
QUERIES: list[dict[str, Any]] = [
    {"qid": 7, "vid": "a_0.0_150.0", "query": "A dog runs.", "relevant_windows": [[0, 2]]},
    {"qid": 8, "vid": "a_0.0_150.0", "query": "It rains", "relevant_windows": [[0, 2]] * 6},
    {"qid": 9, "vid": "absent", "query": "It snows", "relevant_windows": [[0, 2], [4, 6]]},
]
RATED = {"duration": 150, "relevant_clip_ids": [0], "saliency_scores": [[4, 4, 2]]}


def captions(root: Path) -> Path:
    """A root with held-out captions of texts, as the data set of either caption task has them."""
    for name, style in (("pixmo_cap-validation", "long_caption"), ("video_caption-validation", "video_long_caption")):
        records = [
            (f"r{n}", {"json": json.dumps({"annotations": [{"style": style, "text": text}]}).encode()})
            for n, text in enumerate(CAPTIONS)
        ]
        write_shards(root / name, records)
    return root


def highlights(folder: Path) -> Path:
    """The published files of QVHighlights, made."""
    (folder / "videos").mkdir(parents=True)
    lines = [json.dumps(RATED | query) for query in QUERIES]
    (folder / "highlight_val_release.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "videos" / "a_0.0_150.0.mp4").write_bytes(film(20, fps=2, size=(64, 48)))
    return folder


def evaluated(call: list[str], generates: bool = True) -> tuple[int, str, str]:
    """Job: the verb; exit code and what it printed. Where nothing is to be generated, that is an error."""
    from molmo2_nemo.inference.engine import Generator

    start_megatron()
    complete = Generator.complete

    def nothing(self: Any, examples: Any, *rest: Any) -> list[Any]:
        assert not examples
        return []

    if not generates:
        Generator.complete = nothing  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as wrong:
            return main(call), said.getvalue(), wrong.getvalue()
    finally:
        Generator.complete = complete  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return import_checkpoint(tiny_folder(folder / "hf"), folder / "megatron")


def test_captions_with_a_judge(workers, checkpoint, tmp_path, server: Server):
    names = ["pixmo_cap", "video_caption"]
    root, out = captions(tmp_path / "root"), tmp_path / "out"
    call = ["evaluate", str(checkpoint), "--root", str(root), "--out", str(out), "--max-new-tokens", "3"]
    call += ["--tasks", ",".join(names), "--judge", server.url, "--judge-model", "rules", "--judge-at-once", "2"]
    code, said, wrong = workers.run(evaluated, call)[0]
    assert code == 0 and not wrong, wrong
    for name in names:
        result = json.loads((out / f"{name}.json").read_text())
        assert list(result["scores"]) == ["caption_recall", "caption_length", "caption_f1"]
        assert result["group"] == "caption" and result["questions"] == 2
        assert result["judge"] == {"model": "rules", "said": []}
        assert result["scores"]["caption_f1"]["answers"] == 2 and "recall" in result["scores"]["caption_f1"]["figures"]
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert [line["references"] for line in lines] == [[text] for text in CAPTIONS]
        assert set(lines[0]["scores"]) == {"caption_recall", "caption_length", "caption_f1"}
    assert "caption_f1" in said
    asked = len(server.requests)
    code, again, wrong = workers.run(evaluated, call, False)[0]  # nothing is asked twice, and no model
    assert code == 0 and not wrong and asked > 0 and len(server.requests) == asked
    kept = [f"{name}: 2 of 2 answers are those of an earlier command" for name in names]
    assert again.startswith(said.removesuffix(f"written to {out}\n")) and all(text in again for text in kept)


def test_one_rank_asks_the_judge(workers, checkpoint, tmp_path, server: Server):
    call = ["evaluate", str(checkpoint), "--root", str(captions(tmp_path)), "--out", str(tmp_path / "out")]
    call += ["--tasks", "pixmo_cap", "--max-new-tokens", "3", "--judge", server.url, "--judge-model", "rules"]
    told = workers.run(evaluated, [*call, "parallel.data=2"], ranks=2)
    assert [code for code, *_ in told] == [0, 0]
    questions = [request["messages"][0]["content"] for request in server.requests]
    assert questions and len(set(questions)) == len(questions)
    result = json.loads((tmp_path / "out" / "pixmo_cap.json").read_text())
    assert result["scores"]["caption_f1"]["answers"] == 2


def test_a_judge_without_captions_is_said(workers, checkpoint, tmp_path, server: Server):
    qa = {"annotations": [{"style": "user_qa", "question": "Which?", "answer": "a cat"}]}
    write_shards(tmp_path / "own", [("r", {"json": json.dumps(qa).encode()})])
    call = ["evaluate", str(checkpoint), "--data", str(tmp_path / "own"), "--out", str(tmp_path / "out")]
    call += ["--max-new-tokens", "3", "--judge", server.url, "--judge-model", "rules"]
    code, _, wrong = workers.run(evaluated, call)[0]
    assert code == 0 and "--judge was not asked: none of these tasks' answers are captions" in wrong
    assert not server.requests


def test_a_judge_that_does_not_answer_leaves_the_other_scores(workers, checkpoint, tmp_path, server: Server):
    server.faults = [(401, "who are you?")] * 9
    root, out = captions(tmp_path / "root"), tmp_path / "out"
    call = ["evaluate", str(checkpoint), "--data", str(root / "pixmo_cap-validation"), "--out", str(out)]
    call += ["--judge", server.url, "--judge-model", "rules", "--max-new-tokens", "3"]
    code, said, wrong = workers.run(evaluated, call)[0]
    assert code == 0 and "status 401 (who are you?)" in wrong and "did not judge 2 of 2 answers" in wrong
    result = json.loads((out / "pixmo_cap-validation.json").read_text())
    assert list(result["scores"]) == ["caption_recall", "caption_length"] and len(result["judge"]["said"]) == 1
    server.faults.clear()  # judging again generates nothing
    code, said, wrong = workers.run(evaluated, call, False)[0]
    assert code == 0 and not wrong and "caption_f1" in said


@pytest.mark.parametrize("place", ["qv_highlights", "QVHighlights", "video_datasets/QVHighlights"])
def test_the_questions_of_qv_highlights(place, tmp_path):
    highlights(tmp_path / place)
    task = find_task("qv_highlights")
    items = task.open(TaskSettings(tmp_path))
    assert len(items) == 2  # a query with six windows is left out
    (question,) = items.questions(0, None)  # type: ignore[arg-type]
    assert question.key == "7_a_0.0_150.0" and "Query: A dog runs. Which" in question.prompt.question
    assert question.prompt.video.is_file() and question.prompt.style == "video_short_answer"
    score = find_scorer("moment_retrieval").score("Segments: [0-2]", question.references)
    assert score.value == 1 and score.details["hit1"] == 1
    with pytest.raises(UserError, match="absent.mp4: no such file"):
        items.questions(1, None)[0].prompt.example(None)  # type: ignore[arg-type]


def test_qv_highlights_is_evaluated(workers, checkpoint, tmp_path):
    highlights(tmp_path / "qv_highlights")
    call = ["evaluate", str(checkpoint), "--root", str(tmp_path), "--tasks", "qv_highlights", "--frames", "4"]
    code, said, wrong = workers.run(evaluated, [*call, "--out", str(tmp_path / "out"), "--max-new-tokens", "3"])[0]
    assert code == 0, wrong
    result = json.loads((tmp_path / "out" / "qv_highlights@4.json").read_text())
    assert result["questions"] == 2 and result["failed"] == 1
    found = result["scores"]["moment_retrieval"]
    assert found["answers"] == 2 and {"r1@0.5", "r1@0.7", "map", "miou", "hit1"} <= set(found["figures"])
    assert "1 of 2 questions could not be asked" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "qv_highlights@4.jsonl").open()]
    assert ["failed" in line for line in lines] == [False, True] and all(line["tags"] for line in lines)


BROKEN = [
    ("not JSON", "line 1: not JSON"),
    ('{"qid": 1}', "line 1: expected an object with qid, vid, query and relevant_windows"),
    (json.dumps(QUERIES[0] | {"vid": 3}), "line 1: vid and query are texts"),
    (json.dumps(QUERIES[0] | {"relevant_windows": []}), "line 1: moment_retrieval: the reference is"),
    (json.dumps(QUERIES[0] | RATED | {"saliency_scores": []}), "line 1: moment_retrieval: clips and saliency"),
]


@pytest.mark.parametrize(("line", "expected"), BROKEN)
def test_files_that_are_not_as_published(line, expected, tmp_path):
    (highlights(tmp_path / "qv_highlights") / "highlight_val_release.jsonl").write_text(line)
    with pytest.raises(UserError) as error:
        find_task("qv_highlights").open(TaskSettings(tmp_path))
    assert expected in str(error.value)


def test_data_that_are_missing(tmp_path):
    for name, expected in (
        ("qv_highlights", "put there data/highlight_val_release.jsonl of https://github.com/jayleicn/moment_detr"),
        ("pixmo_cap", "write it with `molmo2 prepare pixmo_cap --split validation`"),
        ("video_caption", "write it with `molmo2 prepare video_caption.jsonl --out shards --hold-out 5%`"),
    ):
        with pytest.raises(UserError) as error:
            find_task(name).open(TaskSettings(tmp_path))
        assert expected in str(error.value) and "--root or MOLMO2_DATA" in str(error.value)
    folder = tmp_path / "qv_highlights"
    folder.mkdir()
    (folder / "highlight_val_release.jsonl").touch()
    with pytest.raises(UserError, match="has no videos/; unpack qvhilights_videos.tar.gz there"):
        find_task("qv_highlights").open(TaskSettings(tmp_path))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--judge", "http://h/v1"], "--judge URL and --judge-model NAME belong together"),
        (["--judge-model", "m"], "--judge URL and --judge-model NAME belong together"),
        (["--judge", "h", "--judge-model", "m"], "'h' is not the judge's URL"),
        (["--judge", "http://h/v1", "--judge-model", "m", "--judge-timeout", "0"], "--judge-timeout must be above 0"),
        (["--judge", "http://h/v1", "--judge-model", "m", "--judge-timeout", "nan"], "--judge-timeout must be above"),
        (["--judge", "http://h/v1", "--judge-model", "m", "--judge-at-once", "0"], "--judge-at-once at least 1"),
    ],
)
def test_options_of_a_judge(checkpoint, tmp_path, capsys, words, expected):
    call = ["evaluate", str(checkpoint), "--data", str(captions(tmp_path) / "pixmo_cap-validation")]
    assert main([*call, "--out", str(tmp_path / "out"), *words]) == 2
    assert expected in capsys.readouterr().err
    if expected.startswith("--judge-at-once"):
        assert main([*call, "--judge", "http://h/v1", "--judge-model", "m"]) == 2  # the checkpoint lies in no run
        assert "say where with --out" in capsys.readouterr().err
