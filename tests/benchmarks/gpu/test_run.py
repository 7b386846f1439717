"""A prepared run: parts by name, their time, what a part that fails or hangs leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import run as runner
from benchmarks.gpu.parts import CLOSING, LEAST, NAMES, PARTS, SECONDS, Budget, Part, chosen
from benchmarks.gpu.run import FILES, Run, last_line


def part(name: str, code: str, limit: int = 30, **fields: object) -> Part:
    """A part that runs a line of Python; `timeit` is a module that there is."""
    command = ("-c", code)
    return Part(name, f"title of {name}", 1, limit, command, command, **fields)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(Part, "missing", lambda self: None)
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    begun = time.monotonic()
    budget = Budget(SECONDS)
    return Run(tmp_path / "out", tmp_path / "work", tmp_path, True, budget, clock=lambda: time.monotonic() - begun)


def test_everything_required_fits_into_one_command():
    assert sum(p.expected for p in PARTS if not p.optional) + CLOSING <= SECONDS < 600
    for p in PARTS:
        assert LEAST <= p.limit and p.expected <= p.limit, p.name
        assert p.command[0] == "-m" and (p.tiny is None or p.tiny[:2] == p.command[:2]), p.name
    assert [p.optional for p in PARTS] == sorted(p.optional for p in PARTS)  # the optional ones come last
    assert len(set(NAMES)) == len(NAMES)


def test_parts_by_name_in_their_own_order():
    assert [p.name for p in chosen([])] == list(NAMES)
    assert [p.name for p in chosen(["probe", "train_sft"])] == ["environment", "train_sft", "probe"]
    with pytest.raises(ValueError, match="trian_sft: no such part; there are environment, tests"):
        chosen(["trian_sft"])


@pytest.mark.parametrize(
    ("used", "optional", "expected"),
    [
        (0, False, 100),
        (SECONDS - CLOSING - 60, False, 60),  # what is left
        (SECONDS - CLOSING - LEAST + 1, False, "14 s are left, 15 are needed"),
        (SECONDS - CLOSING - 40, True, 40),
        (SECONDS - CLOSING - 39, True, "39 s are left, 40 are needed"),
        (SECONDS + 50, False, "0 s are left, 15 are needed"),
    ],
)
def test_the_time_a_part_gets(used, optional, expected):
    one = Part("a", "", 40, 100, (), (), optional=optional)
    assert Budget(SECONDS, used).limit(one) == expected
    assert Budget(SECONDS, patience=3.0).limit(one) == 300


def test_a_part_that_fails_or_hangs_leaves_the_others_alone(run):
    print_it = "import pathlib; pathlib.Path(r'{work}/good.json').write_text('{{\"found\": 1}}'); print('all well')"
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', "
    child += "'import time; time.sleep(600)'], stdout=sys.stdout); print('begun', flush=True); time.sleep(600)"
    run.all(
        [
            part("bad", "print('first'); raise SystemExit('it broke')"),
            part("hung", child, limit=3),
            part("good", print_it),
            Part("card", "needs one", 1, 30, ("-c", ""), None),
            part("tests", "print('19 skipped in 10.87s')"),
        ]
    )
    found = {result.name: (result.state, result.why) for result in run.results}
    assert found["bad"] == ("failed", "exit code 1; it broke")
    assert found["hung"] == ("stopped", "after 3 s; begun")
    assert found["good"] == ("passed", "all well")
    assert found["card"] == ("skipped", "needs a card")
    assert found["tests"] == ("skipped", "19 skipped in 10.87s")
    kept = json.loads((run.out / "results.json").read_text())
    assert [p["name"] for p in kept["parts"]] == ["bad", "hung", "good", "card", "tests"]
    assert kept["parts"][2]["data"] == {"found": 1}
    assert "===== hung\nbegun\n" in (run.out / "logs.txt").read_text()
    page = (run.out / "page.md").read_text()
    assert "- hung, stopped: after 3 s; begun" in page and "- card, skipped: needs a card" in page
    assert not descendants(str(run.work))


def descendants(text: str) -> list[str]:
    """Command lines of processes that sleep for the test above."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"import time; time.sleep(600)" in words:
            lines.append(str(words))
    return lines


def test_no_time_left_is_said(run):
    run.budget.total = CLOSING + 5
    run.all([part("late", "print('never')")])
    assert run.results[0].state == "not run" and "are needed" in run.results[0].why


@pytest.mark.parametrize("seconds", ["0", "-5", "nan", "inf"])
def test_no_time_at_all_is_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        runner.main(["--tiny", "--seconds", seconds])
    assert "expected seconds above 0" in capsys.readouterr().err


def test_a_part_asked_for_that_was_not_begun_is_no_success(tmp_path):
    out = ["--out", str(tmp_path / "out"), "--data", str(tmp_path), "--seconds", str(CLOSING + 1)]
    assert runner.main(["--tiny", "environment", *out]) == 1
    assert "1 s are left, 15 are needed" in (tmp_path / "out" / "page.md").read_text()


def test_a_place_for_no_results_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "page.md").write_text("# My page")
    for place in ("file", "file/below", "mine"):
        assert runner.main(["--tiny", "--out", str(tmp_path / place)]) == 2
        assert f"--out {tmp_path / place}: no folder for results: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "mine" / "page.md").read_text() == "# My page"


def test_a_part_that_is_interrupted_says_so(run):
    interrupt = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGUSR1); time.sleep(600)"
    former = signal.signal(signal.SIGUSR1, lambda *_: sys.exit("ended"))
    try:
        with pytest.raises(SystemExit, match="ended"):
            run.all([part("long", interrupt), part("never", "print(1)")])
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert [(r.name, r.state, r.why) for r in run.results] == [("long", "stopped", "by a signal to the whole run")]
    run.end_child()
    assert run.child is None


def without_cards(monkeypatch, **more: str) -> None:
    for name, value in {"CUDA_VISIBLE_DEVICES": "", **more}.items():
        monkeypatch.setenv(name, value)


def test_without_a_card_nothing_is_begun(monkeypatch, tmp_path, capsys):
    """The command itself, with cards hidden from torch: one line, no folder, no shards."""
    without_cards(monkeypatch)
    assert runner.main(["probe", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"no card: torch \S+ of \S+ .*; nothing was begun\. --tiny runs the parts .*\n", said.err)
    assert torch.__version__ in said.err and said.out == "" and not list(tmp_path.iterdir())


def test_a_torch_that_does_not_import_is_named(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    without_cards(monkeypatch, PYTHONPATH=str(tmp_path))
    assert runner.without_card().endswith("cannot ask torch for a card: OSError: libcudart.so.13: cannot open")


def test_a_card_is_seen(monkeypatch, tmp_path):
    """A torch that sees one, after lines that libraries print."""
    said = "print('warning: old driver')\n__version__ = '2.11.0'\n"
    said += "class version: cuda = '13.0'\nclass cuda: is_available = staticmethod(lambda: True)\n"
    (tmp_path / "torch.py").write_text(said)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert runner.without_card() is None


def test_at_most_eight_files_come_back(run):
    for number in range(9):
        (run.work / "profiles" / f"sft-{number}-layers").mkdir(parents=True)
        (run.work / "profiles" / f"sft-{number}-layers" / "steps-5-5.trace.json.gz").write_bytes(b"packed")
    run.save()
    names = sorted(path.name for path in run.out.iterdir())
    assert len(names) == FILES and {"page.md", "results.json", "logs.txt"} <= set(names)
    assert names[-1] == "sft-4-layers.steps-5-5.trace.json.gz"


def test_a_trace_that_is_too_large_stays_behind(run, monkeypatch):
    monkeypatch.setattr(runner, "TRACE_BYTES", 10)
    (run.work / "it.trace.json.gz").write_bytes(bytes(11))
    run.save()
    assert sorted(path.name for path in run.out.iterdir()) == ["logs.txt", "page.md", "results.json"]


def test_the_last_line_that_says_something(tmp_path):
    log = tmp_path / "log"
    log.write_text("first\n3 passed in 2 s\n======\n\n")
    assert last_line(log) == "3 passed in 2 s"
    log.write_text("\n")
    assert last_line(log) == "it said nothing"


def test_a_wrong_part_is_refused_and_the_list_names_all(capsys):
    with pytest.raises(SystemExit):
        runner.main(["probes"])
    assert "probes: no such part" in capsys.readouterr().err
    assert runner.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*NAMES, "together"]


def test_every_module_of_a_part_is_there():
    assert not [p.name for p in PARTS if p.missing()]
