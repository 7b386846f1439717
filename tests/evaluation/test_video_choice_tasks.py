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
from tests.evaluation import test_hub_tasks
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


MVBENCH = {  # file -> folder of its videos, where the row is
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}


def mvbench(root: Path) -> None:
    for name, folder in MVBENCH.items():
        row = {"video": f"{name}.mp4", "question": "Which colour?", "candidates": PLAIN, "answer": "blue"}
        bound = {"start": 0.2, "end": 0.8} if name.startswith("action_") else {}
        put(root / f"MVBench/json/{name}.json", [row | bound])
        place = f"{name}.mp4/video.mp4" if name == "episodic_reasoning" else f"{name}.mp4"
        put(root / f"MVBench/video/{folder}/{place}", FILM)


def temporalbench(root: Path) -> None:
    asked = "Which colour?\n" + "\n".join(FOUR) + "\nAnswer with the option's letter from the given choices directly."
    row = {"idx": "a_0", "video_name": "short_video/a.mp4", "question": asked, "GT": "B"}
    for kind in ("short_qa", "long_qa"):
        put(root / f"TemporalBench/temporalbench_{kind}.json", [row, row | {"idx": "a_1"}])
    put(root / "TemporalBench/short_video/a.mp4", FILM)


def tempcompass(root: Path) -> None:
    row = {"video_id": "7", "dim": "speed"}
    asked = {
        "multi-choice": {"question": "Which colour?\nA. red\nB. blue", "answer": "B. blue"},
        "yes_no": {"question": "Is it blue?", "answer": "yes"},
        "caption_matching": {"question": "Which?\nOption 1: red.\nOption 2: blue.", "answer": "Option 2: blue."},
    }
    for kind, fields in asked.items():
        put(root / f"TempCompass/{kind}/test-00000-of-00001.parquet", [row | fields])
    put(root / "TempCompass/videos/7.mp4", FILM)


def vinoground(root: Path) -> None:
    asked = "Which?\nA. red\nB. blue"
    for kind, place in (("text", "vinoground_videos"), ("video", "vinoground_videos_concated")):
        rows = [
            {
                "idx": f"3_{which}",
                "video_name": f"{place}/3_{which}.mp4",
                "question": asked,
                "GT": gt,
            }
            for which, gt in (("pos", "A"), ("neg", "B"))
        ]
        put(root / f"Vinoground/vinoground_{kind}score.json", rows)
        put(root / f"Vinoground/{rows[0]['video_name']}", FILM)
        put(root / f"Vinoground/{rows[1]['video_name']}", FILM)


def videohallucer(root: Path) -> None:
    for name in ("object_relation", "temporal", "semantic_detail", "external_factual", "external_nonfactual"):
        row = {
            "basic": {"video": "a.mp4", "question": "Is it blue?", "answer": "yes"},
            "hallucination": {"video": "a.mp4", "question": "Is it red?", "answer": "no"},
            "type": "subject",
        }
        put(root / f"VideoHallucer/{name}/{name}.json", [row])
        put(root / f"VideoHallucer/{name}/videos/a.mp4", FILM)


def vsi_bench(root: Path) -> None:
    row = {"id": 0, "dataset": "scannet", "scene_name": "s1", "question": "How many chairs?", "ground_truth": "4"}
    row |= {"question_type": "object_counting", "options": None}
    choice = {"id": 1, "question_type": "route_planning", "options": ["A. left", "B. right"], "ground_truth": "B"}
    put(root / "VSI-Bench/test.jsonl", [row, row | choice])
    put(root / "VSI-Bench/scannet/s1.mp4", FILM)


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
    "mvbench": (mvbench, 20, {"task": "action_sequence"}),
    "temporalbench": (temporalbench, 4, {"kind": "long_qa"}),
}
OTHERS: dict[str, Made] = {  # whose answers are no options
    "tempcompass": (tempcompass, 3, {"kind": "multi-choice", "aspect": "speed"}),
    "vinoground": (vinoground, 4, {"kind": "text"}),
    "videohallucer": (videohallucer, 10, {"set": "object_relation", "asked": "basic"}),
    "vsi_bench": (vsi_bench, 2, {"kind": "object_counting"}),
}
# task -> number of a question, what it is with the name of its style, right and wrong answers
ASKED: list[tuple[str, int, str, str, str]] = [
    ("tempcompass", 0, "Which colour?\nA. red\nB. blue\nPlease directly give the best option:", "B", "A"),
    ("tempcompass", 1, "video_short_answer: Is it blue?\nPlease answer yes or no:", "Yes", "no"),
    (
        *("tempcompass", 2, "Which?\nOption 1: red.\nOption 2: blue.\nPlease directly give the best option:"),
        *("Option 2: blue.", "Option 1"),
    ),
    ("vinoground", 1, "Which?\nA. red\nB. blue\nPlease only output one English character.", "B", "A"),
    ("videohallucer", 1, "video_short_answer: Is it red?\nAnswer the question using 'yes' or 'no'.", "No.", "yes"),
    (
        *("vsi_bench", 0, "video_short_answer: These are frames of a video.\nHow many chairs?\n"),
        *("4", "ten"),
    ),
    (
        *("vsi_bench", 1, "These are frames of a video.\nHow many chairs?\nOptions:\nA. left\nB. right\n"),
        *("B", "A. left"),
    ),
]
SHOWN = {  # subtitles of the questions
    "videomme_subtitles": [[(0.1, 0.6, "a blue sky")]] * 2,
    "longvideobench_subtitles": [[(0.0, 0.5, "a blue"), (0.5, 1.5, "sky")], [(0.25, 0.75, "blue")]],
}


@pytest.fixture(scope="module")
def builder() -> ExampleBuilder:
    return ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"), training=False)


def test_every_benchmark_is_tested():
    assert {name for name in task_names() if isinstance(find_task(name), VideoChoiceTask)} == {*TASKS, *OTHERS}


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


@pytest.mark.parametrize("name", OTHERS)
def test_a_benchmark_without_options_is_read_as_published(name, tmp_path, builder):
    make, count, tags = OTHERS[name]
    make(tmp_path)
    items = find_task(name).open(TaskSettings(tmp_path))
    asked = [question for number in range(len(items)) for question in items.questions(number, builder)]
    assert len(asked) == count == len({question.key for question in asked}) and asked[0].tags == tags
    assert {question.prompt.video.read_bytes() for question in asked} == {FILM}
    (scorer,) = map(find_scorer, find_task(name).scorers)
    for question in asked:
        scorer.check(question.references)
    expected = [{"answer": "B", **question.references[0]} for question in asked]
    said = [str(reference.get("number", reference["answer"])) for reference in expected]
    right = [scorer.score(text, question.references) for text, question in zip(said, asked, strict=True)]
    assert scorer.aggregate(right) == 1


@pytest.mark.parametrize(("name", "number", "text", "right", "wrong"), ASKED)
def test_the_wording_of_questions_without_options(name, number, text, right, wrong, tmp_path, builder):
    OTHERS[name][0](tmp_path)
    (question,) = find_task(name).open(TaskSettings(tmp_path)).questions(number, builder)
    asked = question.prompt.example(builder).info["conversations"][0][0][0]
    assert asked == text or (text.endswith("\n") and asked.startswith(text) and "\n" not in asked[len(text) :])
    (scorer,) = map(find_scorer, find_task(name).scorers)
    assert [scorer.score(answer, question.references).value for answer in (right, wrong)] == [1, 0]


def test_only_the_part_that_is_asked_about_is_shown(tmp_path, builder):
    mvbench(tmp_path)
    items = find_task("mvbench").open(TaskSettings(tmp_path))
    ((part,), (whole,)) = (items.questions(number, builder) for number in (0, 3))
    assert (part.prompt.clip, whole.prompt.clip) == ((0.2, 0.8), None)
    times = [question.prompt.example(builder).info["frame_times"] for question in (part, whole)]
    assert max(times[0]) < 0.65 < max(times[1])


@pytest.mark.parametrize("name", ["videomme_subtitles", "lvbench"])
def test_its_questions_can_be_shown_to_a_model(name, tmp_path, builder):
    TASKS[name][0](tmp_path)
    (question,) = find_task(name).open(TaskSettings(tmp_path)).questions(0, builder)
    text = builder.tokenizer.decode(question.prompt.example(builder).input_ids.tolist())
    assert "Which colour?\n" in text and ("a blue sky" in text) == (name == "videomme_subtitles")


@pytest.mark.parametrize("name", [*TASKS, *OTHERS])
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


VSI = {"id": 1, "dataset": "scannet", "scene_name": "s1", "question": "Where?", "question_type": "route_planning"}
VSI |= {"options": ["A. left", "B. right"], "ground_truth": "B"}
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
    "no letter": ("vsi_bench", "VSI-Bench/test.jsonl", [VSI | {"ground_truth": "left"}], "the answer is 'left' of 2"),
    "no number": ("vsi_bench", "VSI-Bench/test.jsonl", [VSI | {"options": None}], "not a question of vsi_bench"),
    "no pair": (
        *("videohallucer", "VideoHallucer/object_relation/object_relation.json", [{"basic": {}}]),
        "not a question of videohallucer",
    ),
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
    """Figures by tag, and the answers about a missing video and a broken picture among the wrong ones."""
    lvbench(tmp_path)
    longvideobench(tmp_path)
    (tmp_path / "LVBench/abc.mp4").unlink()
    test_hub_tasks.put(tmp_path, "mmlu")
    broken = {"image_list": [{"bytes": b"\x89PNG\r\n\x1a\nno more", "path": "a"}]}
    test_hub_tasks.put(tmp_path, "muirbench", [test_hub_tasks.MUIR | broken, test_hub_tasks.MUIR])
    names = "lvbench,longvideobench_subtitles,mmlu,muirbench"
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
    expected = {"mmlu": ("text", 1, 0), "muirbench": ("image QA", 2, 1)}  # group, questions, not asked
    for name, of in expected.items():
        result = json.loads((tmp_path / f"out/{name}.json").read_text())
        assert (result["group"], result["questions"], result["failed"]) == of
    (lost, _) = map(json.loads, (tmp_path / "out/muirbench.jsonl").open())
    assert "image" in lost["failed"] and lost["scores"] == {"parsed_choice": {"value": 0.0}}
