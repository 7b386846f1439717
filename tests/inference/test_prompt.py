"""What a prompt shows: parts of films with their subtitles, and settings that replace the run's for answers only."""

import io

import numpy as np
import pytest
from PIL import Image

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.record import Subtitle
from molmo2_nemo.inference.prompt import Prompt, Shown
from tests.inference.test_engine import the_tokenizer
from tests.support.films import film
from tests.support.packs import demo_data


def test_subtitles_are_those_of_the_clip_on_its_clock():
    lines = [(0.0, 1.0, "before"), (1.5, 2.5, "begins"), (2.5, 3.0, "inside"), (3.5, 9.0, "ends"), (4.0, 5.0, "after")]
    found = Prompt("?", video=b"", subtitles=lines, clip=(2.0, 4.0)).clipped_subtitles()
    assert found == [Subtitle(0.0, 0.5, "begins"), Subtitle(0.5, 1.0, "inside"), Subtitle(1.5, 2.0, "ends")]
    assert [s.text for s in Prompt("?", video=b"", subtitles=lines).clipped_subtitles()] == [t for _, _, t in lines]


@pytest.fixture
def run(shards):
    return demo_data(shards)


def frames(config, **prompt):
    builder = ExampleBuilder(config, the_tokenizer(config), training=False)
    return len(builder.prompt(video=film(180), question="?", **prompt).unit_crops)  # 6 s, 30 fps


def test_frames_and_rates_replace_the_runs(run):
    assert run.video.max_frames == 8 and run.video.max_fps == 2.0
    assert frames(run) == 8
    assert frames(Shown(frames=3).settings(run)) == 3
    assert frames(Shown(frames=100).settings(run)) == 13, "two a second, both ends"
    assert frames(Shown(frames=100, fps=1.0).settings(run)) == 7
    assert run.video.max_frames == 8, "the run's settings stay"


def test_tiles_replace_the_runs(run):
    file = io.BytesIO()
    Image.fromarray(np.zeros((600, 1200, 3), np.uint8)).save(file, "PNG")

    def crops(shown):
        config = shown.settings(run)
        example = ExampleBuilder(config, the_tokenizer(config), training=False).prompt([file.getvalue()], question="?")
        return len(example.crops)

    assert crops(Shown(max_crops=1)) == 1 + 1
    assert crops(Shown(max_crops=1)) < crops(Shown()) <= 1 + 4 < crops(Shown(max_crops=12)) <= 1 + 12
    assert crops(Shown(max_crops=12)) < crops(Shown(high_res=True)) == crops(Shown(max_crops=24)) <= 1 + 24
