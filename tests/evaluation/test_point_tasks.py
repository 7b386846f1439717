"""Records with points and tracks as questions: the answer that training would have is right by every scorer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.masks import write_mask
from molmo2_nemo.evaluation.records import settled
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.task import Question, TaskSettings
from molmo2_nemo.evaluation.tasks import find_task
from tests.support.films import film


def png(width: int = 200, height: int = 100) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "grey").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def builder() -> ExampleBuilder:
    return ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"), training=False)


IMAGE = {"images": ["png"]}
POINTS = {"label": "cups", "points": [[20, 30], [150, 90]]}
MOVING = [
    {"time": t / 2, "points": {"a": {"point": [20 + 5 * t, 30]}, "b": {"point": [90, 60], "occluded": t == 1}}}
    for t in range(4)
]
TRACK = {"label": "dogs", "points": MOVING, "width": 100, "height": 100}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {  # record, annotation, scorers
    "pixels": (IMAGE, {"style": "pointing", **POINTS}, {"pointing"}),
    "percent": (
        IMAGE,
        {"style": "point_count", "label": "cups", "point_scale": 100, "points": [[10, 30], [75, 90]]},
        {"pointing", "point_count"},
    ),
    "none": (IMAGE, {"style": "point_count", "label": "cups", "points": []}, {"pointing", "point_count"}),
    "several": (
        {"images": ["png", "1.png"]},
        {"style": "multi_image_point_then_count", "label": "cups", "points": [[[20, 30]], [[150, 90], [10, 10]]]},
        {"pointing", "point_count"},
    ),
    "video": (
        {"video": "mp4"},
        {"style": "video_point_count", "label": "cups", "timestamps": [0.5, 2.0], "points": [[[20, 30]], [[50, 9]]]},
        {"video_point", "video_point_count"},
    ),
    "track": ({"video": "mp4"}, {"style": "video_point_track_per_frame", **TRACK}, {"track"}),
    "ground": ({"video": "mp4"}, {"style": "video_point_ground_start_end", **TRACK}, {"track"}),
    "one": ({"video": "mp4"}, {"style": "video_single_point_track_per_frame", **TRACK}, {"track"}),
    "untracked": ({"video": "mp4"}, {"style": "video_point_track_per_frame", **TRACK, "points": []}, {"track"}),
}


def members(media: dict[str, Any], annotation: dict[str, Any]) -> dict[str, bytes]:
    files = {name: png() for name in media.get("images", ())} | ({"mp4": film(90)} if "video" in media else {})
    return {"json": json.dumps({**media, "annotations": [annotation]}).encode(), **files}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write_shards(root / "own", [(name, members(*case[:2])) for name, case in CASES.items()])
    image = CASES["percent"]
    for name in ("pixmo_count_train", "pixmo_points_train", "pixmo_multi_points"):
        write_shards(root / f"{name}-validation", [(name, members(*image[:2]))])
    return root


def own(shards: Path, builder: ExampleBuilder) -> dict[str, Question]:
    from molmo2_nemo.evaluation.shard_task import OwnData

    items = OwnData(str(shards / "own")).open(TaskSettings(shards))
    asked = [question for number in range(len(items)) for question in items.questions(number, builder)]
    return {question.key.split(":")[-1].split("/")[0]: question for question in asked}


@pytest.mark.parametrize("name", CASES)
def test_the_trained_answer_is_right(shards, builder, name):
    question = own(shards, builder)[name]
    assert set(question.scorers) == CASES[name][2]
    record = settled(parse_record(f"own:{name}", members(*CASES[name][:2])))
    ((_, answer),) = builder.plan(record, np.random.default_rng(0)).info["conversations"][0]
    for scorer in question.scorers:
        find_scorer(scorer).check(question.references)
        assert find_scorer(scorer).score(answer, question.references).value == 1, (answer, question.references)
        assert find_scorer(scorer).score("A very blue sky.", question.references).value == (
            name in ("untracked", "none")
        )


def test_a_question_about_some_images_has_the_points_of_these(shards, builder):
    question = own(shards, builder)["several"]
    assert "image_1?" in question.prompt.question  # drawn so from the task's one seed
    assert [len(image["points"]) for image in question.references[0]["images"]] == [1, 0]


def test_tracks_ask_only_for_what_an_answer_has(shards, builder):
    """All of it at the task's rate; the two ends; what comes after the given start."""
    asked = own(shards, builder)
    times = {
        name: [frame["time"] for frame in asked[name].references[0]["frames"]] for name in ("track", "ground", "one")
    }
    assert times == {"track": [0.0, 0.5, 1.0, 1.5], "ground": [0.0, 1.5], "one": [0.5, 1.0, 1.5]}
    assert [len(frame["points"]) for frame in asked["track"].references[0]["frames"]] == [2, 1, 2, 2]


@pytest.mark.parametrize("name", ["count", "point", "multi_image_point"])
def test_tasks_on_held_out_records(shards, builder, name, tmp_path):
    task = find_task(name)
    (question,) = task.open(TaskSettings(shards)).questions(0, builder)
    assert question.scorers == task.scorers and question.references[0]["size"] == [200, 100]
    assert question.references[0]["points"] == [[20, 30], [150, 90]]  # of 10 and 75 % of the width: pixels
    for scorer in task.scorers:
        find_scorer(scorer).check(question.references)
    with pytest.raises(UserError, match=f"{name}: no data set .*{task.prepare}"):
        task.open(TaskSettings(tmp_path))


def box(x: int, y: int, reach: int = 10, size: tuple[int, int] = (320, 180)) -> dict[str, Any]:
    pixels = np.zeros((size[1], size[0]), bool)
    pixels[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = True
    return write_mask(pixels)


POINT_ROW = {
    "video_id": "sora2/cups",
    "label": "cups",
    "width": 320,
    "height": 180,
    "video_duration": 3.0,
    "two_fps_timestamps": [0.5, 2.0],
    "points": [{"x": 40, "y": 50}, {"x": 200, "y": 100}],
    "masks": [
        [{"frame_id": 1, "rle": box(40, 50)}, {"frame_id": 2, "rle": box(60, 50)}],
        [{"frame_id": 4, "rle": box(200, 100)}],
    ],
}
COUNT_ROW = {"video_id": "abc", "label": "jumps", "question": "How many jumps?", "count": 3, "category": "action/event"}
TRACK_ROW = {
    "id": "t1",
    "clip": "zoo/a",
    "exp": "the dogs",
    "fps": 6.0,
    "w": 320,
    "h": 180,
    "mask_id": ["x", "y"],
    "video_dataset": "APTv2",
    "points": [
        {"object_id": "y", "points": [[30 + frame, 40] for frame in range(18)]},
        {"object_id": "x", "points": [None] * 12 + [[200, 90]] * 6},
    ],
    "masks": [
        {"object_id": "y", "masks": [box(30 + frame, 40) for frame in range(18)]},
        {"object_id": "x", "masks": [None] * 12 + [box(200, 90)] * 6},
    ],
}
PUBLISHED = {  # task: its folder, row, the video's place, an answer that is right, one that is half right
    "video_point": (
        *("Molmo2-VideoPointEval", POINT_ROW, "generated_videos/sora2-2fps/cups_2fps.mp4"),
        'Counting the <points coords="1.0 1 190 280;2.0 2 625 555">cups</points> shows a total of 2.',
        'Counting the <points coords="0.5 1 190 280;2.0 2 625 555">cups</points> shows a total of 2.',
    ),
    "video_count": (
        *("Molmo2-VideoCountEval", {**COUNT_ROW, "clip_start": 1.0, "clip_end": 2.5}, "youtube/abc_2fps.mp4"),
        *("3", "4"),
    ),
    "track": (
        *("Molmo2-VideoTrackEval", TRACK_ROW, "APTv2/zoo/a.mp4"),
        '<tracks coords="0.0 1 094 222;1.0 1 112 222;2.0 1 131 222 2 625 500">the dogs</tracks>',
        '<tracks coords="0.0 1 994 222;1.0 1 112 222;2.0 1 131 222 2 125 500">the dogs</tracks>',
    ),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for folder, row, video, *_ in PUBLISHED.values():
        place = root / folder / video
        place.parent.mkdir(parents=True)
        place.write_bytes(film(90, size=(320, 180)))
        (root / folder / "data").mkdir()
        absent = {**row, "video_id": "sora2/absent", "clip": "zoo/absent"}
        table = pa.Table.from_pylist([row, {name: absent[name] for name in row}])
        pq.write_table(table, root / folder / "data" / "val-00000.parquet", row_group_size=1)
    return root


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_questions(published, builder, name):
    """Masks decide: the first answer is right by them alone, at a time that has no point or off the mask it is not."""
    _, _, _, right, half = PUBLISHED[name]
    task = find_task(name)
    items = task.open(TaskSettings(published))
    assert len(items) == 2
    (question,) = items.questions(0, builder)
    builder.prompt(video=question.prompt.video, question=question.prompt.question, style=None)  # it can be asked
    scorer = find_scorer(task.scorers[0])
    scorer.check(question.references)
    assert scorer.score(right, question.references).value == 1
    assert 0 <= scorer.score(half, question.references).value < 1
    with pytest.raises(UserError, match="no video .*below"):
        items.questions(1, builder)


def test_questions_of_published_files_are_worded_as_released(published, builder):
    asked = {name: find_task(name).open(TaskSettings(published)).questions(0, builder)[0] for name in PUBLISHED}
    assert asked["video_point"].prompt.question.endswith('How many "cups" are there in the video?')
    assert asked["video_count"].prompt.question.endswith("How many jumps?")
    assert asked["video_count"].prompt.clip == (1.0, 2.5) and asked["video_count"].tags == {"category": "action/event"}
    assert "the dogs" in asked["track"].prompt.question and asked["track"].tags == {"source": "APTv2"}
    frames = asked["track"].references[0]["frames"]
    assert [(frame["time"], sorted(frame["points"])) for frame in frames] == [(0, ["y"]), (1, ["y"]), (2, ["x", "y"])]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_missing_of_published_files_is_named(published, name, tmp_path):
    folder, row, video, *_ = PUBLISHED[name]
    with pytest.raises(UserError, match=f"task {name}: .*no such folder; download the data set allenai/{folder}"):
        find_task(name).open(TaskSettings(tmp_path))
    (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match="no question in"):
        find_task(name).open(TaskSettings(tmp_path))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / folder / "a.parquet")
    with pytest.raises(UserError, match="no video;"):
        find_task(name).open(TaskSettings(tmp_path))
    pq.write_table(pa.table({"label": ["x"]}), tmp_path / folder / "b.parquet")
    with pytest.raises(UserError, match="b.parquet has no column"):
        find_task(name).open(TaskSettings(tmp_path))
