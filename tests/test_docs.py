"""docs/code.md is a map: what it names is there. So are the tests that docs/mistakes.md names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_layers import LAYERS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "code.md").read_text()


def part(title: str) -> str:
    """The text below a heading, to the next one."""
    return TEXT.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


ANSWERS = re.findall(r"^\| [^|]*\? \| `([^`]+)`(?:[^|`]*`(\w+)`)?[^|]*\|$", part("Where is it?"), re.M)


def test_the_newcomers_questions_are_answered():
    assert len(ANSWERS) >= 14


@pytest.mark.parametrize(("file", "name"), ANSWERS, ids=[file for file, _ in ANSWERS])
def test_an_answer_is_one_file_that_is_there(file: str, name: str):
    path = ROOT / file if file.startswith("data_prep/") else ROOT / "molmo2_nemo" / file
    assert path.is_file()
    assert not name or re.search(rf"\b{name}\b", path.read_text())


def test_the_layers_stand_in_their_order():
    shown = re.findall(
        r"^(\w+)(?:/|\.py)(?: (\w+)\.py)?(?: (\w+)\.py)?", part("Layers").split("Beside the package")[0], re.M
    )
    assert tuple(name for names in shown for name in names if name) == LAYERS


def test_tests_of_answered_mistakes_are_there():
    """docs/mistakes.md: 40 numbered answers, each with the test that holds it."""
    text = (ROOT / "docs" / "mistakes.md").read_text()
    answers = re.split(r"^\d+\. ", text.split("\n\nBeside them")[0], flags=re.M)[1:]
    named = [re.findall(r"`([\w/]+\.py)::(\w+)`", answer) for answer in answers]
    assert len(answers) == 40 and all(named)
    for file, test in [*(pair for pairs in named for pair in pairs), *re.findall(r"`([\w/]+\.py)::(\w+)`", text)]:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)


def test_every_file_named_is_there():
    named = set(re.findall(r"`?((?:\w+/)*\w+\.py)\b", TEXT))
    places = [ROOT, ROOT / "molmo2_nemo", *(p for p in (ROOT / "molmo2_nemo").rglob("*") if p.is_dir())]
    places += [ROOT / "data_prep", ROOT / "requirements"]
    assert not [name for name in sorted(named) if not any((place / name).is_file() for place in places)]
    linked = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert linked and not [link for link in linked if not (ROOT / "docs" / link).exists()]
