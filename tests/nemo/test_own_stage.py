"""The example of a stage of one's own in docs/configuration.md, as it is written there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from molmo2_nemo.launch.pipeline import compose_stages
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.progress import read_run
from molmo2_nemo.settings.compose import compose

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture
def example(tmp_path, shards, monkeypatch):
    """The commands of the page, in a folder that has the page's file."""
    section = PAGE.read_text().split("## A stage of your own\n")[1].split("\n## ")[0]
    (text,) = re.findall(r"```yaml\n(.*?)```", section, re.S)
    path = Path(re.search(r"# (my_conf/\S+\.yaml)", text)[1])
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    monkeypatch.setenv("MOLMO2_DEMO_DATA", str(shards))
    (commands,) = re.findall(r"```\n(molmo2.*?)```", section, re.S)
    return [shlex.split(line)[1:] for line in commands.splitlines()]


def composed(words: list[str], folder: Path, *more: str):
    """What `molmo2 WORDS` would run, from `folder`."""
    verb, option, config_dir, *overrides = words
    assert option == "--config-dir"
    make = {"train": compose, "pipeline": compose_stages}[verb]
    return make([*overrides, f"output_dir='{folder}/run'", *more], folder / config_dir)


def train_job(text: str) -> None:
    from molmo2_nemo.nemo.train import train
    from molmo2_nemo.settings.schema import read_yaml

    train(read_yaml(text, "the example"))


def test_it_trains_as_written(workers, example, tmp_path):
    from molmo2_nemo.settings.schema import to_yaml

    cfg = composed(example[0], tmp_path, "stage.max_steps=2")
    assert (cfg.stage.name, cfg.data.packing.sequence_length, cfg.stage.train_vit) == ("clips", 2048, False)
    assert cfg.data.text.root_length_weight  # from the stage that it is made of
    write_config(cfg)
    workers.run(train_job, to_yaml(cfg), fit=True)
    (stage,) = read_run(tmp_path / "run")
    assert (stage.name, stage.state, stage.step) == ("clips", "finished", 2)


def test_it_stands_in_a_list_as_written(example, tmp_path):
    configs = composed(example[1], tmp_path)
    assert [c.stage.name for c in configs] == ["pretrain", "sft", "clips", "long"]
    assert [c.stage.max_steps for c in configs] == [60, 60, 50, 30]
