"""Benchmarks of multiple choice about videos, on made files in the published layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.convert import import_checkpoint
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.task import TaskSettings
from molmo2_nemo.evaluation.tasks import find_task, task_names
from molmo2_nemo.evaluation.video_choice import VideoChoiceTask
from tests.convert.test_parity import tiny_folder
from tests.support.films import film
from tests.support.pool import start_megatron

FILM = film(30)
FOUR = ["A. red", "B. blue", "C. green", "D. grey"]
PLAIN = ["red", "blue", "green", "grey"]


def put(path: Path, content: bytes | str | list[dict[str, Any]] | dict[str, Any]) -> None:
    """A file: bytes, text, or rows in the form that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content))


def videomme(root: Path) -> None:
    row = {"video_id": "001", "videoID": "abc", "question_id": "001-1", "question": "Which colour?", "options": FOUR}
    row |= {"answer": "B", "duration": "short", "domain": "x", "sub_category": "Law", "task_type": "OCR Problems"}
    put(root / "Video-MME/videomme/test-00000-of-00001.parquet", [row, row | {"question_id": "001-2", "answer": "D"}])
    put(root / "Video-MME/data/abc.mp4", FILM)
    put(root / "Video-MME/subtitles.json", {"abc": {"0": {"start": 0.1, "end": 0.6, "text": "a blue sky"}}})


def longvideobench(root: Path) -> None:
    row = {"id": "abc_0", "video_id": "abc", "video_path": "abc.mp4", "question": "Which colour?", "candidates": PLAIN}
    row |= {"correct_choice": 1, "duration_group": 15, "question_category": "S2E", "subtitle_path": "abc_en.json"}
    row |= {"starting_timestamp_for_subtitles": 100.0, "duration": 1, "level": "L1-Perception"}
    put(root / "LongVideoBench/lvb_val.json", [row, row | {"subtitle_path": "clock.json", "duration_group": 3600}])
    put(root / "LongVideoBench/videos/abc.mp4", FILM)
    lines = [(90.0, 95.0, "before"), (99.0, 100.5, "a blue"), (100.5, 101.5, "sky"), (101.5, 103.0, "after")]
    entries = [{"timestamp": [start, end], "text": text} for start, end, text in lines]
    put(root / "LongVideoBench/subtitles/abc_en.json", entries)
    clock = [{"start": "00:01:40.250", "end": "00:01:40.750", "line": "blue"}]
    put(root / "LongVideoBench/subtitles/clock.json", clock)


def mlvu(root: Path) -> None:
    kinds = ["plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning"]
    for number, kind in enumerate(kinds, start=1):
        row = {
            "video": f"{kind}.mp4",
            "question": "Which colour?",
            "candidates": PLAIN,
            "answer": "blue",
            "duration": 9,
        }
        put(root / f"MLVU/json/{number}_{kind}.json", [row])
        put(root / f"MLVU/video/{number}_{kind}/{kind}.mp4", FILM)


def lvbench(root: Path) -> None:
    asked = "Which colour?\n(A) red\n(B) blue\n(C) green\n(D) grey"
    qa = {"uid": "7", "question": asked, "answer": "B", "question_type": ["reasoning", "summarization"]}
    rows = [{"key": "abc", "type": "cartoon", "qa": [qa | {"time_reference": "00:10-00:20"}, qa | {"uid": "8"}]}]
    put(root / "LVBench/video_info.meta.jsonl", rows)
    put(root / "LVBench/abc.mp4", FILM)


def nextqa(root: Path) -> None:
    row = {"video": 417, "question": "which colour ", "type": "CW", "answer": 1, "a4": "white"}
    row |= {f"a{number}": f" {text}" for number, text in enumerate(PLAIN)}
    put(root / "NeXTQA/MC/test-00000-of-00001.parquet", [row])
    put(root / "NeXTQA/NExTVideo/417.mp4", FILM)


def perception_test(root: Path) -> None:
    row = {"video_name": "v1", "question_id": "3", "question": "Which colour?", "options": PLAIN[:3], "answer_id": "1"}
    row |= {"area": "physics", "reasoning": "descriptive"}
    put(root / "PerceptionTest/mc_question_val/validation-00000-of-00001.parquet", [row])
    put(root / "PerceptionTest/videos/v1.mp4", FILM)


def tomato(root: Path) -> None:
    for kind in ("count", "direction", "rotation", "shape&trend", "velocity&frequency", "visual_cues"):
        row = {"question": "Which colour?", "demonstration_type": "human", "options": PLAIN, "answer": 1, "key": "01"}
        put(root / f"TOMATO/data/{kind}.json", {"0": row | {"motion_type": "x"}})
    put(root / "TOMATO/videos/human/01.mp4", FILM)


def motionbench(root: Path) -> None:
    qa = {"uid": "7", "question": "Which colour?\n" + "\n".join(FOUR), "answer": "B"}
    row = {
        "key": "k",
        "video_path": "abc.mp4",
        "question_type": "Motion Recognition",
        "qa": [qa, qa | {"answer": "NA"}],
    }
    put(root / "MotionBench/video_info.meta.jsonl", [row])
    put(root / "MotionBench/public-dataset/abc.mp4", FILM)


def egoschema(root: Path) -> None:
    row = {"video_idx": "abc", "question_idx": "5", "question": "Which colour?", "option": [*FOUR, "E. white"]}
    put(root / "EgoSchema/Subset/test-00000-of-00001.parquet", [row | {"answer": "1"}])
    put(root / "EgoSchema/videos/abc.mp4", FILM)


def videoevalpro(root: Path) -> None:
    row = {"video": "abc.mp4", "question": "Which colour?", "options": FOUR, "answer": "B", "answer_text": "blue"}
    row |= {"source": "lvbench", "qa_type": "Local Perception", "qa_subtype": "x"}
    put(root / "VideoEvalPro/data/test-00000-of-00001.parquet", [row])
    put(root / "VideoEvalPro/videos/videos_filtered/abc.mp4", FILM)


Made = tuple[Callable[[Path], None], int, dict[str, str]]
TASKS: dict[str, Made] = {  # name -> what makes its files, how many questions, tags of the first
    "videomme": (videomme, 2, {"duration": "short", "type": "OCR Problems"}),
    "videomme_subtitles": (videomme, 2, {"duration": "short", "type": "OCR Problems"}),
    "longvideobench": (longvideobench, 2, {"duration": "15", "category": "S2E"}),
    "longvideobench_subtitles": (longvideobench, 2, {"duration": "15", "category": "S2E"}),
    "mlvu": (mlvu, 7, {"type": "plotQA"}),
    "lvbench": (lvbench, 2, {"reasoning": "yes", "summarization": "yes"}),
    "nextqa": (nextqa, 1, {"type": "CW"}),
    "perception_test": (perception_test, 1, {"area": "physics"}),
    "tomato": (tomato, 6, {"reasoning": "count", "demonstration": "human"}),
    "motionbench": (motionbench, 1, {"type": "Motion Recognition"}),
    "egoschema": (egoschema, 1, {}),
    "videoevalpro": (videoevalpro, 1, {"source": "lvbench", "type": "Local Perception"}),
}
SHOWN = {  # subtitles of the questions
    "videomme_subtitles": [[(0.1, 0.6, "a blue sky")]] * 2,
    "longvideobench_subtitles": [[(0.0, 0.5, "a blue"), (0.5, 1.5, "sky")], [(0.25, 0.75, "blue")]],
}


@pytest.fixture(scope="module")
def builder() -> ExampleBuilder:
    return ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"), training=False)


def test_every_benchmark_is_tested():
    assert {name for name in task_names() if isinstance(find_task(name), VideoChoiceTask)} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_benchmark_is_read_as_published(name, tmp_path, builder):
    make, count, tags = TASKS[name]
    make(tmp_path)
    task = find_task(name)
    items = task.open(TaskSettings(tmp_path))
    asked = [question for number in range(len(items)) for question in items.questions(number, builder)]
    assert len(asked) == count and len({question.key for question in asked}) == count
    question = asked[0]
    scorer = find_scorer(task.scorers[0])
    scorer.check(question.references)
    assert (question.tags, question.prompt.video.read_bytes()) == (tags, FILM)
    assert question.references[0]["option"] == "B" and "blue" in question.references[0]["options"][1]
    assert "which colour" in question.prompt.question.lower() and "\nB. blue" in question.prompt.question
    assert [scorer.score(answer, question.references).value for answer in ("B. blue", "B", "A. red")] == [1, 1, 0]
    assert [list(question.prompt.subtitles) for question in asked] == SHOWN.get(name, [[]] * count)


@pytest.mark.parametrize("name", ["videomme_subtitles", "lvbench"])
def test_its_questions_can_be_shown_to_a_model(name, tmp_path, builder):
    TASKS[name][0](tmp_path)
    (question,) = find_task(name).open(TaskSettings(tmp_path)).questions(0, builder)
    text = builder.tokenizer.decode(question.prompt.example(builder).input_ids.tolist())
    assert "Which colour?\n" in text and ("a blue sky" in text) == (name == "videomme_subtitles")


@pytest.mark.parametrize("name", TASKS)
def test_files_that_are_not_there(name, tmp_path):
    with pytest.raises(UserError, match=r"put there .*--root or MOLMO2_DATA"):
        find_task(name).open(TaskSettings(tmp_path))


def test_the_released_loaders_folder_is_found(tmp_path):
    videomme(tmp_path / "video_datasets")
    assert len(find_task("videomme").open(TaskSettings(tmp_path))) == 2


def test_a_missing_video_is_said_when_it_is_asked_about(tmp_path, builder):
    lvbench(tmp_path)
    (tmp_path / "LVBench/abc.mp4").unlink()
    items = find_task("lvbench").open(TaskSettings(tmp_path))
    (question,) = items.questions(0, builder)
    with pytest.raises(UserError, match=r"abc\.mp4: no such file"):
        question.prompt.example(builder)


def test_subtitles_that_are_not_there(tmp_path):
    videomme(tmp_path)
    (tmp_path / "Video-MME/subtitles.json").unlink()
    with pytest.raises(UserError, match=r"subtitles\.json of https"):
        find_task("videomme_subtitles").open(TaskSettings(tmp_path))


BAD: dict[str, tuple[str, str, Any, str]] = {  # name -> task, file, content, message
    "no JSON": ("mlvu", "MLVU/json/1_plotQA.json", b"[{", "not JSON"),
    "no list": ("mlvu", "MLVU/json/1_plotQA.json", {}, "expected a list"),
    "no field": ("mlvu", "MLVU/json/1_plotQA.json", [{"question": "x"}], r"row 1: not a question of mlvu \(KeyError"),
    "no object": ("longvideobench", "LongVideoBench/lvb_val.json", ["x"], "row 1: not a question"),
    "letters": (
        "lvbench",
        "LVBench/video_info.meta.jsonl",
        [{"key": "k", "qa": [{"uid": "1", "question": "x?\n(B) red\n(A) blue", "answer": "A", "question_type": []}]}],
        r"expected \(A\), \(B\)",
    ),
    "answer": (
        "motionbench",
        "MotionBench/video_info.meta.jsonl",
        [{"key": "k", "video_path": "a.mp4", "qa": [{"uid": "1", "question": "x?\nA. red", "answer": "C"}]}],
        "the answer is 'C' of 1 options",
    ),
    "no row": ("tomato", "TOMATO/data/count.json", {"0": "x"}, "not a question of tomato"),
    "no Parquet": ("videomme", "Video-MME/videomme/test-00000-of-00001.parquet", b"x", "cannot be read as Parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_tables_that_are_not_as_published(name, tmp_path):
    task, file, content, message = BAD[name]
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        put(path, content)
    with pytest.raises(UserError, match=message) as caught:
        find_task(task).open(TaskSettings(tmp_path))
    assert path.name in str(caught.value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return import_checkpoint(tiny_folder(folder / "hf"), folder / "megatron")


def evaluated(call: list[str]) -> int:
    """Job: the verb on this rank; its exit code."""
    start_megatron()
    return main(call)


def test_a_benchmark_is_evaluated(workers, checkpoint, tmp_path):
    """Figures by tag, and the answer about the missing video among the wrong ones."""
    lvbench(tmp_path)
    longvideobench(tmp_path)
    (tmp_path / "LVBench/abc.mp4").unlink()
    names = "lvbench,longvideobench_subtitles"
    call = ["evaluate", str(checkpoint), "--tasks", names, "--root", str(tmp_path), "--max-new-tokens", "4"]
    assert workers.run(evaluated, [*call, "--out", str(tmp_path / "out")])[0] == 0
    missing = json.loads((tmp_path / "out/lvbench.json").read_text())
    assert (missing["scores"]["option_start"]["score"], missing["failed"]) == (0, 2)
    assert all(
        line["references"] and line["failed"] for line in map(json.loads, (tmp_path / "out/lvbench.jsonl").open())
    )
    found = json.loads((tmp_path / "out/longvideobench_subtitles.json").read_text())
    assert (found["questions"], found["failed"], found["group"]) == (2, 0, "long video QA")
    assert set(found["scores"]["longvideobench"]["by"]["duration"]) == {"15", "3600"}
