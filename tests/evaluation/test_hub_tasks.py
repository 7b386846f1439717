"""Benchmarks published as tables on the Hub, on made rows of the published columns: read, asked, scored, damaged."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.hub_tables import HubTask
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.task import Question, TaskSettings
from molmo2_nemo.evaluation.tasks import find_task, task_names

WIDTH, HEIGHT = 200, 100
URL = "https://example.org/cat.jpg"
ONE = "mmmu/1"  # the first question of a task


def png(colour: str = "grey") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), colour).save(out, "PNG")
    return out.getvalue()


def shown(colour: str = "grey") -> dict[str, Any]:
    return {"bytes": png(colour), "path": "a.png"}


def mask(left: int, right: int) -> list[list[bool]]:
    found = np.zeros((HEIGHT, WIDTH), bool)
    found[20:30, left:right] = True
    return found.tolist()


PLAIN = "\nOnly return the correct answer option.\nA. red\nB. blue"
MMMU = {
    "id": "validation_Art_Theory_1",
    "question": "Which <image 1>?",
    "options": "['red', 'blue']",
    "answer": "B",
    "question_type": "multiple-choice",
    "image_1": shown(),
}
VISTA: dict[str, Any] = {
    "pid": "1",
    "question": "Hint: Answer with the letter.\nQuestion: Which?\nHint: none",
    "decoded_image": shown(),
    "choices": ["red", "blue"],
    "precision": None,
    "answer": "blue",
    "question_type": "multi_choice",
    "answer_type": "text",
    "metadata": {"task": "figure question answering", "skills": ["x"]},
}
REAL = {
    "image": shown(),
    "question": "Which?\n\nA. red\nB. blue\nPlease answer directly with only the letter of the correct option and "
    "nothing else.",
    "answer": "B",
}
MUIR = {
    "task": "Counting",
    "question": "<image> and <image>?",
    "options": ["red", "blue"],
    "answer": "B",
    "image_list": [shown(), shown("red")],
}
BLINK = {
    "sub_task": "Jigsaw",
    "prompt": "Which?\nSelect from the following choices.\n(A) red\n(B) blue",
    "choices": ["red", "blue"],
    "answer": "(B)",
    **{f"image_{n}": shown() if n < 3 else None for n in range(1, 5)},
}
MMIU = {
    "task": "sorting",
    "question": "Which?",
    "options": "A: red\nB: blue",
    "output": "B",
    "input_image_path": ["./2D-spatial/sorting/a.png", "./2D-spatial/sorting/b.png"],
}
OSWORLD = {
    "image": shown(),
    "instruction": "Close the window",
    "box_type": "bbox",
    "box_coordinates": [100.0, 20.0, 40.0, 10.0],
}
COUNT = {"image": shown(), "number": 2}
PIXMO = {
    "image_url": URL,
    "image_sha256": hashlib.sha256(png()).hexdigest(),
    "label": "Eyes",
    "points": [{"x": 55.0, "y": 25.0}],
    "masks": [mask(100, 140)],
}
TEXT = {"question": "Which?", "subject": "anatomy", "choices": ["red", "blue"], "answer": 1}
ARC = {"question": "Which?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"}
GSM = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}
LONG = {
    **{"domain": "Code", "difficulty": "easy", "length": "short", "question": "Which?", "answer": "B"},
    **{"choice_A": "red", "choice_B": "blue", "choice_C": "green", "choice_D": "grey", "context": "All of it."},
}
POINT = '<points coords="1 1 {}">it</points>'
IN, OUT = POINT.format("600 250"), POINT.format("480 250")

# task -> file, rows, question as the model reads it, pictures, tags, right and wrong answers
Made = tuple[str, list[dict[str, Any]], str, int, dict[str, str], list[str], list[str]]
TASKS: dict[str, Made] = {
    "mmmu": (
        *("MMMU/Art_Theory/validation-00000-of-00001.parquet", [MMMU], "Which <image 1>?" + PLAIN, 1),
        *({"subject": "Art_Theory", "type": "multiple-choice"}, ["B", "B. blue"], ["A", "A. red"]),
    ),
    "mathvista": (
        *("MathVista/data/testmini-00000-of-00001-a.parquet", [VISTA], "Which?" + PLAIN, 1),
        *({"type": "choice", "task": "figure question answering"}, ["B", "B. blue"], ["A. red"]),
    ),
    "realworldqa": (
        *("RealworldQA/data/test-00000-of-00002.parquet", [REAL], REAL["question"], 1),
        *({"type": "multiple choice"}, ["B", "B. blue"], ["A", "C"]),
    ),
    "muirbench": (
        *("MUIRBENCH/data/test-00000-of-00003.parquet", [MUIR], "Image 1 and Image 2?" + PLAIN, 2),
        *({"task": "Counting"}, ["B", "(B)"], ["A. red"]),
    ),
    "blink": (
        *("BLINK/Jigsaw/val-00000-of-00001.parquet", [BLINK], BLINK["prompt"], 2),
        *({"task": "Jigsaw"}, ["(B)", "B"], ["(A)"]),
    ),
    "mmiu": (
        *("MMIU-Benchmark/all.parquet", [MMIU], "Which?" + PLAIN, 2),
        *({"task": "sorting", "relation": "2D-spatial"}, ["B. blue"], ["A"]),
    ),
    "osworld_g": (
        *("OSWorld-G/data/test-00000-of-00001.parquet", [OSWORLD], "Close the window", 1),
        *({"target": "bbox"}, [IN, f"{IN} {OUT}"], [OUT, "there"]),
    ),
    "countbench": (
        *("countbench/data/train-00000-of-00001-a.parquet", [COUNT], "How many cups are there?", 1),
        *({}, [POINT.format("600 250 2 480 250")], [IN, "2"]),
    ),
    "pixmo_points_eval": (
        *("pixmo-points-eval/data/test-00000-of-00001.parquet", [PIXMO], "Point to eyes.", 1),
        *({}, [IN], [OUT, "there"]),
    ),
    "mmlu": (
        *("mmlu/all/test-00000-of-00001.parquet", [TEXT], "Which?" + PLAIN, 0),
        *({"subject": "anatomy"}, ["B", "blue"], ["A", "red"]),
    ),
    "arc_challenge": (
        *("ai2_arc/ARC-Challenge/test-00000-of-00001.parquet", [ARC], "Which?" + PLAIN, 0),
        *({}, ["B. blue"], ["A", "2"]),
    ),
    "gsm8k": (
        "gsm8k/main/test-00000-of-00001.parquet",
        [GSM],
        'How many?\nWork it out step by step. Then write "#### " and the answer, a number.',
        *(0, {}, ["So 5. #### 1005", "It is $1,005.00"], ["#### 1004", "1005 - 1 = 1004", "none"]),
    ),
    "longbench_v2": (
        "LongBench-v2/data.json",
        [LONG | {"length": "long"}, LONG],
        "Please read the following text and answer the question below.\n\nAll of it.\n\nWhich?"
        f"{PLAIN}\nC. green\nD. grey",
        *(0, {"domain": "Code", "difficulty": "easy"}, ["B. blue"], ["C"]),
    ),
}


def put(root: Path, name: str, rows: list[dict[str, Any]] | None = None) -> Path:
    """The files of a task; its table."""
    file, made, *_ = TASKS[name]
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows or made))
    else:
        pq.write_table(pa.Table.from_pylist(rows or made), path)
    asked = [{"question": "How many cups are there?"}] * len(rows or made)
    (root / "countbench").mkdir(exist_ok=True)
    (root / "countbench/countbench_paired_questions.json").write_text(json.dumps(asked))
    places = ("2D-spatial/sorting/a.png", "2D-spatial/2D-spatial/sorting/b.png")  # unpacked in either way
    for image in (f"pixmo-points-eval/images/{PIXMO['image_sha256']}.png", *(f"MMIU-Benchmark/{at}" for at in places)):
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        (root / image).write_bytes(png())
    return path


@pytest.fixture(scope="module")
def builder() -> ExampleBuilder:
    return ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"), training=False)


def asked(root: Path, name: str, builder: ExampleBuilder, rows: list[dict[str, Any]] | None = None) -> Question:
    put(root, name, rows)
    items = find_task(name).open(TaskSettings(root))
    assert len(items) == 1
    (question,) = items.questions(0, builder)
    return question


def test_every_such_task_is_tested():
    assert {name for name in task_names() if isinstance(find_task(name), HubTask)} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_questions(name, tmp_path, builder):
    _, _, text, images, tags, right, wrong = TASKS[name]
    question = asked(tmp_path, name, builder)
    assert (question.prompt.question, dict(question.tags)) == (text, tags)
    example = question.prompt.example(builder)
    assert [image["size"] for image in example.info.get("images", ())] == [[WIDTH, HEIGHT]] * images
    assert text in builder.tokenizer.decode(example.input_ids.tolist())
    (scorer,) = map(find_scorer, find_task(name).scorers)
    scorer.check(question.references)
    assert [scorer.score(answer, question.references).value for answer in right] == [1] * len(right)
    assert [scorer.score(answer, question.references).value for answer in wrong] == [0] * len(wrong)


Variant = tuple[str, dict[str, Any], str, int, str, str]
VARIANTS: dict[str, Variant] = {  # task, what differs in the row, question, pictures, right, wrong
    "open questions of MMMU": (
        *("mmmu", {"question_type": "open", "answer": "12.50", "options": "[]"}),
        *("vqa2: Which <image 1>?", 1, "It is 12.5", "12"),
    ),
    "pictures as options of MMMU": (
        *("mmmu", {"options": "[\"<img='a.png'>\", \"<img='b.png'>\"]"}),
        *("Which <image 1>?\nOnly return the correct answer option.\nA. <img='a.png'>\nB. <img='b.png'>", 0, "B", "A"),
    ),
    "numbers of MathVista": (
        *("mathvista", {"question_type": "free_form", "answer_type": "float", "answer": "1.2", "precision": 1.0}),
        *("vqa2: Which?", 1, "1.23", "1.3"),
    ),
    "short answers of RealWorldQA": (
        "realworldqa",
        {"question": "How many?\nPlease answer directly with a single word or number.", "answer": "2"},
        *("vqa2: How many?", 1, "Two", "3"),
    ),
    "one picture of BLINK": ("blink", {"image_2": None}, BLINK["prompt"], 1, "(B)", "(A)"),
    "polygons of OSWorld-G": (
        *("osworld_g", {"box_type": "polygon", "box_coordinates": [100.0, 20.0, 140.0, 20.0, 140.0, 30.0]}),
        *("Close the window", 1, POINT.format("690 220"), POINT.format("520 290")),
    ),
    "refusals of OSWorld-G": (
        *("osworld_g", {"box_type": "refusal", "box_coordinates": [-1.0] * 4}),
        *("Close the window", 1, "There is none.", IN),
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_other_kinds_of_rows(case, tmp_path, builder):
    name, more, text, images, right, wrong = VARIANTS[case]
    question = asked(tmp_path, name, builder, [TASKS[name][1][0] | more])
    example = question.prompt.example(builder)
    assert len(example.info.get("images", ())) == images
    assert example.info["conversations"][0][0][0] == text
    (scorer,) = map(find_scorer, find_task(name).scorers)
    assert [scorer.score(answer, question.references).value for answer in (right, wrong)] == [1, 0]


@pytest.mark.parametrize("name", TASKS)
def test_what_is_missing_is_named(name, tmp_path):
    with pytest.raises(UserError, match=rf"task {name}: no .*; download the data set .* of huggingface.co"):
        find_task(name).open(TaskSettings(tmp_path))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "longbench_v2"])
def test_tables_that_are_not_as_published(name, tmp_path):
    path = put(tmp_path, name)
    column = find_task(name).columns[0]
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    with pytest.raises(UserError, match=rf"{path.name} has no column '{column}'; is it of {find_task(name).dataset}"):
        find_task(name).open(TaskSettings(tmp_path))
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        find_task(name).open(TaskSettings(tmp_path))


Damage = tuple[str, dict[str, Any], str]
DAMAGED: dict[str, Damage] = {  # task, what differs in the row, message
    "no picture": ("mathvista", {"decoded_image": {"bytes": b"", "path": "a.png"}}, "the row has no picture"),
    "a broken picture": ("muirbench", {"image_list": [{"bytes": b"\x89PNG\r\n\x1a\nno more", "path": "a"}]}, "image"),
    "no letter": ("realworldqa", {"answer": ""}, "the answer is ''; expected the letter"),
    "an answer past the options": ("mmmu", {"answer": "D"}, "the answer is 'D' of 2 options"),
    "no list of options": ("mmmu", {"options": "red, blue"}, "not as MMMU/MMMU is published"),
    "another kind of box": ("osworld_g", {"box_type": "ellipse"}, "box_type is 'ellipse'; expected bbox"),
    "another number of coordinates": ("osworld_g", {"box_coordinates": [1.0]}, "not as MMInstruction/OSWorld-G is pub"),
    "no image of the URL": ("pixmo_points_eval", {"image_sha256": "0" * 64}, f"fetch {URL}"),
    "no number": ("gsm8k", {"answer": "five"}, "no number after ####"),
    "an image that is not there": ("mmiu", {"input_image_path": ["./2D-spatial/none.png"]}, "none.png: no such file"),
    "an image elsewhere": ("mmiu", {"input_image_path": ["./../../secret.png"]}, "input_image_path has"),
    "a letter of no option": ("mmiu", {"output": "G"}, "the answer is 'G' of 2 options"),
    "no answer": ("mmlu", {"answer": 7}, "the answer is 'H' of 2 options"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_rows_are_said_one_by_one(case, tmp_path, builder):
    name, more, message = DAMAGED[case]
    first = TASKS[name][1][0]
    put(tmp_path, name, [first | more, first])
    items = find_task(name).open(TaskSettings(tmp_path))
    with pytest.raises(UserError, match=message):
        (question,) = items.questions(0, builder)
        question.prompt.example(builder)
    (question,) = items.questions(1, builder)
    question.prompt.example(builder)


def test_images_of_the_released_downloader_are_found(tmp_path, builder):
    put(tmp_path, "pixmo_points_eval")
    (path,) = (tmp_path / "pixmo-points-eval/images").iterdir()
    path.rename(path.with_name(hashlib.sha256(URL.encode()).hexdigest()))
    (question,) = find_task("pixmo_points_eval").open(TaskSettings(tmp_path)).questions(0, builder)
    assert question.references[0]["points"] == [[pytest.approx(110), pytest.approx(25)]]


def test_pictures_of_one_channel_are_not_counted_in(tmp_path, builder):
    out = io.BytesIO()
    Image.new("L", (WIDTH, HEIGHT)).save(out, "PNG")
    grey = {"image": {"bytes": out.getvalue(), "path": "a.png"}, "number": 3}
    broken = {"image": {"bytes": b"none", "path": "a.png"}, "number": 4}
    path = put(tmp_path, "countbench", [grey, {"image": None, "number": 5}, COUNT, broken])
    items = find_task("countbench").open(TaskSettings(tmp_path))
    (first,), (second,) = (items.questions(number, builder) for number in range(len(items)))
    assert (first.references, first.key[-2:], second.references) == (({"count": 2},), ":2", ({"count": 4},))
    with pytest.raises(UserError, match="image"):
        second.prompt.example(builder)
    questions = path.parents[1] / "countbench_paired_questions.json"
    questions.write_text("[]")
    with pytest.raises(UserError, match="a question for each of the 4 rows"):
        find_task("countbench").open(TaskSettings(tmp_path))
    questions.unlink()
    with pytest.raises(UserError, match="no .*countbench_paired_questions.json; put there"):
        find_task("countbench").open(TaskSettings(tmp_path))


def turns_around(x: float, y: float, corners: list[list[float]]) -> bool:
    """Whether a polygon turns around a point: the sum of the angles under which its edges are seen is not 0."""
    angles = [math.atan2(b - y, a - x) for a, b in corners]
    steps = [(b - a + math.pi) % (2 * math.pi) - math.pi for a, b in zip(angles, angles[1:] + angles[:1], strict=True)]
    return abs(sum(steps)) > 1


def test_points_in_polygons():
    """Against the winding number, on polygons that do not cross themselves."""
    rng, scorer, inside = random.Random(3), find_scorer("point_in_box"), 0
    for _ in range(600):
        angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.randint(3, 8)))
        corners = [[500 + rng.uniform(80, 450) * f(angle) for f in (math.cos, math.sin)] for angle in angles]
        x, y = rng.randrange(250, 750), rng.randrange(250, 750)
        reference = {"polygon": corners, "size": [1000, 1000]}
        expected = turns_around(x, y, corners)
        found = scorer.score(POINT.format(f"{x:03} {y:03}"), [reference]).value
        assert found == expected, (corners, x, y)
        inside += expected
    assert 100 < inside < 500


WRITTEN = ("{}", "{:,}", "{}.00", "${:,}", "{}.", "{:,} km")


def test_the_last_number_is_read_however_it_is_written():
    rng, scorer = random.Random(4), find_scorer("final_number")
    for _ in range(600):
        answer, other = rng.sample(range(-3, 2_000_000), 2)
        if answer < 0 and rng.random() < 0.5:
            answer = -answer
        other, marked = abs(other), rng.random() < 0.5
        said, before = (rng.choice(WRITTEN).format(number).replace("$-", "-$") for number in (answer, other))
        text = f"First {before}, then\n{other} + 1. #### {said}, not {other}" if marked else f"{before} so {said}"
        score = scorer.score(text, [str(answer)])
        assert score.value == 1 and score.details["marked"] == marked, text
        assert scorer.score(text, [str(answer + 1)]).value == 0
