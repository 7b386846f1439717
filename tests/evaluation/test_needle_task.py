"""The task needle: which questions there are, and the heat map of their answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.needles.heat_map import by_length, draw, heat_map
from molmo2_nemo.evaluation.task import TaskSettings
from molmo2_nemo.evaluation.tasks import find_task


def builder(frames: int) -> ExampleBuilder:
    image = ImageConfig(crop_size=126, margin=2)
    config = DataConfig(image=image, video=VideoConfig(max_frames=frames))
    return ExampleBuilder(config, Molmo2Tokenizer.load("tiny"), training=False)


def asked(frames: int, depths: int, seed: int = 0):
    items = find_task("needle").open(TaskSettings(Path(), seed=seed, frames=frames, depths=depths))
    return [question for n in range(len(items)) for question in items.questions(n, builder(frames))]


def test_every_depth_has_the_same_questions():
    questions = asked(24, 4)
    assert len({q.key for q in questions}) == len(questions) == 4 * 2 * 6
    assert Counter(q.tags["depth"] for q in questions) == dict.fromkeys(("0.00", "0.33", "0.67", "1.00"), 12)
    assert Counter(q.tags["needle"] for q in questions) == {"picture": 40, "text": 8}
    assert {q.tags["frames"] for q in questions} == {"24"}


def test_the_model_is_shown_every_frame_and_the_sentence():
    question = next(q for q in asked(24, 2) if q.tags["needle"] == "text")
    example = question.prompt.example(builder(24))
    assert len(example.crops) == 24
    words = Molmo2Tokenizer.load("tiny").decode(example.input_ids[~example.visual].tolist())
    assert f"The secret word is {question.references[0]}." in words


def test_another_seed_asks_about_other_films():
    one, same, other = asked(8, 3), asked(8, 3), asked(8, 3, seed=1)
    answers = [[q.references for q in questions] for questions in (one, same, other)]
    assert answers[0] == answers[1] != answers[2]
    assert one[0].prompt.video == same[0].prompt.video != other[0].prompt.video


@pytest.mark.parametrize(
    ("settings", "seen"),
    [({"frames": 2}, "haystacks of 2 frames; they need 3 or more"), ({"seed": -1}, "a seed of 0 or more, not -1")],
)
def test_what_draws_no_film_is_said_before_a_model_loads(settings, seen):
    with pytest.raises(UserError, match=seen):
        find_task("needle").open(TaskSettings(Path(), **settings))


def line(depth: str, frames: int, value: float, needle: str = "picture"):
    tags = {"needle": needle, "depth": depth, "frames": str(frames)}
    return {"tags": tags, "scores": {"exact_match": {"value": value}}}


def test_a_heat_map_has_the_mean_of_each_cell():
    lines = [
        line("0.00", 8, 1),
        line("0.00", 8, 0),
        line("0.50", 8, 1),
        line("0.00", 128, 0),
        line("0.00", 8, 0, "text"),
    ]
    found = heat_map(lines, "picture")
    assert found["depths"] == [0.0, 0.5] and found["frames"] == [8, 128]
    assert found["accuracy"] == [[0.5, 0.0], [1.0, None]]
    assert found["answers"] == [[2, 1], [1, 0]]
    assert by_length(found) == {8: pytest.approx(2 / 3), 128: 0.0}


def test_the_task_writes_the_maps_of_all_passes(tmp_path):
    import json

    failed = {"tags": {}, "scores": {"exact_match": {"value": 0.0}}}
    find_task("needle").draw([line("0.00", 8, 1), line("0.00", 16, 0), failed], tmp_path)
    (found,) = json.loads((tmp_path / "needle_map.json").read_text())["maps"]
    assert found["needle"] == "picture" and found["frames"] == [8, 16] and found["accuracy"] == [[1.0, 0.0]]
    assert (tmp_path / "needle.png").stat().st_size > 1000


def test_a_heat_map_is_drawn(tmp_path):
    from PIL import Image

    right = heat_map([line("0.00", 8, 1), line("1.00", 8, 1)], "picture")
    wrong = heat_map([line("0.00", 8, 0), line("1.00", 8, 0)], "picture")
    pictures = [
        np.asarray(Image.open(draw([found], tmp_path / f"{name}.png", title="t")).convert("RGB")).astype(int)
        for name, found in (("right", right), ("wrong", wrong))
    ]
    middle = [picture[picture.shape[0] // 3, picture.shape[1] // 4] for picture in pictures]
    assert middle[0][1] > middle[0][0] and middle[1][0] > middle[1][1]  # green, red


def test_a_heat_map_that_cannot_be_written_leaves_the_one_before(tmp_path):
    import resource

    found = heat_map([line("0.00", 8, 1), line("1.00", 8, 0)], "picture")
    path = draw([found], tmp_path / "needle.png", title="t")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # the system refuses more, as a full disk does
    try:
        with pytest.raises(OSError) as error:
            draw([found, found], path, title="t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(path) and list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_the_task_asks_as_training_did():
    from data_prep.needles import record
    from molmo2_nemo.evaluation.needles.needle import Needle

    trained = record(Needle(1, 9, 0.5, 0.5), VideoConfig(max_frames=9))["annotations"]
    questions = asked(9, 1)[:6]
    assert [q.prompt.question for q in questions] == [a["question"] for a in trained]
    assert {a["style"] for a in trained} == {replace(questions[0].prompt).style}


def test_a_checkpoint_may_have_an_equals_sign_in_its_name(tmp_path):
    """As those of every run do: .../checkpoints/step=50 is no setting."""
    import subprocess
    import sys

    folder = tmp_path / "step=50"
    folder.mkdir()
    words = [sys.executable, "-m", "molmo2_nemo.cli.main", "evaluate", str(folder), "--tasks", "needle"]
    said = subprocess.run(words, capture_output=True, text=True, check=False)
    assert said.returncode == 2 and "name one checkpoint" not in said.stderr and "step=50" in said.stderr
