"""docs/data.md and the pages it goes on in, as strangers use it: examples print what is shown, options are there."""

import argparse
import re
import shlex
import shutil
from pathlib import Path

import pytest

from data_prep import demo
from molmo2_nemo.cli import prepare, shards
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import SourceConfig
from molmo2_nemo.data.reader import ExampleReader, default_builder
from molmo2_nemo.settings.compose import compose

DOCS = Path(__file__).parents[2] / "docs"
PAGE = "\n".join((DOCS / name).read_text() for name in ("data.md", "own_files.md", "bringing.md"))
FILES = dict(re.findall(r"^cat > (\w+\.jsonl) <<'END'\n(.*?)^END\n", PAGE, re.M | re.S))


def commands(verb, *words):
    """The words of the page's commands `molmo2 VERB ...` that hold `words`."""
    joined = PAGE.replace("\\\n", " ")
    found = [shlex.split(line, comments=True)[1:] for line in re.findall(rf"^molmo2 {verb} .*$", joined, re.M)]
    return [line for line in found if all(word in line for word in words)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the demo's media and the page's files."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'"(\w+\.(?:jpg|mp4))"', "".join(FILES.values())):
        shutil.copy(demo.MEDIA / name, tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_first_example_prints_what_the_page_says(place, capsys):
    (call,) = commands("prepare", "own.jsonl", "--out")[:1]
    assert main([*call, "--workers", "0"]) == 0
    printed = PAGE.split("left out:\n\n```\n")[1].split("\n```")[0]
    assert capsys.readouterr().out.strip() == printed


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_prepared_whole_and_trained(name, place, capsys):
    """Oracle: the loader of training, with the page's own command for it."""
    (call,) = [call for call in commands("prepare", name) if call[2:4] == ["--out", "shards"]]
    assert main([*call, "--workers", "0", "--strict"]) == 0
    lost = re.findall(r"^ {5,}\d+  (.*)$", capsys.readouterr().out, re.M)
    assert not [text for text in lost if "sampled sparsely" not in text]
    (train,) = commands("train", "output_dir=runs/own")
    if "--for" in call:
        assert call[call.index("--for") + 1 :] == train[1:3], "checked with the limits of its own training"
    config = compose(train[1:]).data
    assert list(config.sources) == ["own"] and config.sources["own"].path == "shards/own"
    stem = name.removesuffix(".jsonl")
    config.sources = {stem: SourceConfig(path=f"shards/{stem}")}
    builder, im_patch = default_builder(config)
    reader = ExampleReader(config, builder, im_patch)
    examples = [reader[n] for n in range(len(reader.datasets[stem]))]
    assert len(examples) == FILES[name].count("\n")
    assert all((example.loss_weights > 0).any() for example in examples)


def test_the_page_trains_as_the_readme_does():
    """The same settings but for names, so that what was learned at one place holds at the other."""
    readme = (DOCS.parent / "README.md").read_text()
    (theirs,) = re.findall(r"^ +molmo2 (train recipe=tiny .*runs/mine.*)$", readme, re.M)
    (ours,) = commands("train", "output_dir=runs/own")

    def shape(words):
        return {word.partition("=")[0].replace("mine", "own") for word in words}

    assert shape(shlex.split(theirs)) == shape(ours)


@pytest.mark.parametrize("verb", [prepare, shards], ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_option_is_on_the_page(verb):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    shown = set(re.findall(r"^\| `(--[\w-]+)", PAGE, re.M))
    assert len(options) > 10 and set(options) - {"--help"} <= shown
    known = {option for module in (prepare, shards) for option in options_of(module)}
    assert shown <= known, "options that are gone"
    for action in parser._actions:
        if isinstance(action.default, int) and not isinstance(action.default, bool):
            (row,) = re.findall(rf"^\| `{action.option_strings[0]} .*$", PAGE, re.M)
            assert f"({int(action.default):,}" in row.replace("(1000)", "(1,000)").replace("(4096)", "(4,096)"), row


def options_of(module):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return [option for action in parser._actions for option in action.option_strings]


def test_tables_fit_a_terminal():
    assert not [line for line in PAGE.splitlines() if line.startswith("|") and len(line) > 80]
