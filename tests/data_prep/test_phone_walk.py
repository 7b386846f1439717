"""The walk of docs/data.md with 300 phone videos and a table: its commands print what the page shows."""

import re
import shlex
from pathlib import Path

import av
import numpy as np
import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import SourceConfig
from molmo2_nemo.data.reader import ExampleReader, default_builder
from molmo2_nemo.settings.compose import compose

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
WALK = PAGE.split("### A walk: 300 phone videos and a table")[1].split("\n### ")[0]
COUNT, SECONDS = 300, 1


def film(path, number):
    """Different for every number."""
    brightness, height = number % 200, 8 * (1 + number // 200)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 64, "yuv420p"
        for i in range(8 * SECONDS):
            picture = np.full((64, 48, 3), min(brightness + 4 * i, 255), np.uint8)
            picture[:height, :8] = 255 - picture[:height, :8]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def place(tmp_path, monkeypatch):
    """What the walk starts from; of the 300 videos one is empty, one is gone, and one has no answer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phone").mkdir()
    head, *first = WALK.split("```\n")[1].splitlines()
    lines = [
        f"VID_{n:04d}.mp4;What happens?;Number {n} gets brighter.;{('Ben', 'Ann')[n % 2]}" for n in range(1, COUNT + 1)
    ]
    assert first == lines[:2]
    lines[99] = "VID_0100.mp4;What happens?;;Ben"
    (tmp_path / "phone.csv").write_text("\r\n".join([head, *lines]) + "\r\n")
    for n in range(1, COUNT):
        if n != 200:
            film(tmp_path / "phone" / f"VID_{n:04d}.mp4", n)
    (tmp_path / "phone" / "VID_0300.mp4").touch()
    (tmp_path / "phone.yaml").write_text(re.search(r"```yaml\n(.*?)```", WALK, re.S)[1])
    return tmp_path


def shown():
    """(words of a command, what the page says that it prints)."""
    return [(shlex.split(call)[1:], said) for call, said in re.findall(r"^\$ (molmo2 .*)\n((?:.+\n)+?)```", WALK, re.M)]


def test_the_walk(place, capsys):
    (first, error), (second, printed) = shown()
    assert main([*first, "--workers", "0"]) == 2
    assert capsys.readouterr().err == error
    assert main([*second, "--workers", "0"]) == 0
    said = capsys.readouterr().out.partition("checked for")[0]
    sizes = r"[\d.]+ MB"
    assert re.sub(sizes, "MB", said).replace(str(place), "/home/ann") == re.sub(sizes, "MB", printed)
    (call,) = re.findall(r"^molmo2 (train .*)$", WALK.replace("\\\n", " "), re.M)
    config = compose(shlex.split(call)[1:]).data
    assert config.sources == {"phone": SourceConfig(path="shards/phone")}
    builder, im_patch = default_builder(config)
    reader = ExampleReader(config, builder, im_patch)
    assert len(reader.datasets["phone"]) == COUNT - 3
    assert all((reader[n].loss_weights > 0).any() for n in range(0, COUNT - 3, 50))
