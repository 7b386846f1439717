"""GPU memory in a run's report: of files as runs write them, of many ranks, and of damaged files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from molmo2_nemo.preview.device_memory import DRAWN, section
from molmo2_nemo.rundir.progress import StageProgress

MIB = 2**20
FIGURES: dict[str, Any] = {
    "reserved": 100 * MIB,
    "allocated": 50 * MIB,
    "peak": 60 * MIB,
    "events": 4,
    "at": [0.0, 1.5, 2.0],
    "rank": 0,
    "whole": True,
    "failed": {"wanted": 5 * MIB, "free": 3 * MIB, "place": "a/<b>.py f"},
    "places": [
        {"name": "x/<i>y.py f", "at_peak": 40 * MIB, "points": [MIB, 2 * MIB, 40 * MIB]},
        {"name": "z.py g", "at_peak": 20 * MIB, "points": [0, 0, 20 * MIB]},
    ],
}
WRONG = [
    None,
    "1",
    "<b>x",
    -5,
    1e400,
    float("nan"),
    10**30,
    10**400,
    [],
    [1, "a"],
    [None],
    {},
    {"a": 1},
    [float("nan")],
]


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "sft" / "memory").mkdir(parents=True)
    return StageProgress("sft", tmp_path / "sft")


def write(stage: StageProgress, name: str, text: str) -> None:
    (stage.folder / "memory" / f"{name}.json").write_text(text)


def test_who_held_it_is_drawn(stage):
    write(stage, "out-of-memory.rank-0", json.dumps(FIGURES))
    page = section([stage])
    assert "Memory ran out: 5.0 MiB were asked for by a/&lt;b&gt;.py f, 3.0 MiB were free; 50 MiB in use" in page
    assert "peak 60 MiB in 4 allocations and frees." in page
    assert "x/<wbr>&lt;i&gt;y.py f</td><td>40 MiB</td><td>67%</td>" in page and page.count("<svg") == 2


def test_of_many_ranks_the_first_are_drawn_and_all_are_named(stage):
    ranks = 3 * DRAWN
    for rank in range(ranks):
        write(stage, f"out-of-memory.rank-{rank}", json.dumps(FIGURES))
    write(stage, "steps-3-5.rank-0", json.dumps(FIGURES | {"failed": None}))
    page = section([stage])
    heads = [part.partition("</h3>")[0] for part in page.split("<h3>")[1:]]
    assert heads == [*(f"sft, rank {rank}, out of memory" for rank in range(ranks)), "sft, rank 0, steps 3-5"]
    assert page.count("Memory ran out: ") == ranks and page.count("<svg") == 2 * (DRAWN + 1)


def values(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside one."""
    for key in range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from values(value[key], (*path, key))


def test_damaged_files_are_named(stage):
    """Each value is replaced by others, or missing; what is no figure of a run's is said, and the page is made."""
    said = 0
    for path in values(FIGURES):
        for wrong in [*WRONG, KeyError]:
            damaged = copy.deepcopy(FIGURES)
            inner: Any = damaged
            for key in path[:-1]:
                inner = inner[key]
            if wrong is KeyError:
                del inner[path[-1]]
            else:
                inner[path[-1]] = wrong
            write(stage, "out-of-memory.rank-0", json.dumps(damaged))
            page = section([stage])
            assert "<h3>sft, rank 0, out of memory</h3>" in page and "<b>" not in page and "<i>" not in page
            said += "out-of-memory.rank-0.json is damaged (its " in page
    assert said > 200


@pytest.mark.parametrize("text", ["", "\ud800", "3", "null", 20_000 * "[", 20_000 * '{"a":'])
def test_what_is_no_object_is_named(stage, text):
    (stage.folder / "memory" / "steps-1-2.rank-7.json").write_bytes(text.encode(errors="surrogatepass"))
    page = section([stage])
    assert "<h3>sft, rank 7, steps 1-2</h3>" in page and "steps-1-2.rank-7.json is damaged (" in page
