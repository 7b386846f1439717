"""docs/nemo.md: its lines that run anywhere, as they stand, and what they leave behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.search(r"## Look, run, look again\n.*?```\n(.*?)```", (ROOT / "docs" / "nemo.md").read_text(), re.S)
assert BLOCK is not None
LINES = BLOCK[1].splitlines()


def nemo_job(line: str, folder: str, shards: str) -> str:
    """NeMo's command in this process, one of those that a launcher has started; what it printed."""
    from nemo.collections import llm  # noqa: F401  (Megatron's part of it wants an stderr with a file behind it)
    from nemo_run.cli.api import create_cli

    printed, before = io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.dict(os.environ, MOLMO2_DEMO_DATA=shards, COLUMNS="120"),
            mock.patch.object(sys, "argv", shlex.split(line)),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            create_cli()(standalone_mode=False)
    finally:
        os.chdir(before)
    return printed.getvalue()


@pytest.fixture(scope="module")
def walked(shards, molmo2, workers, tmp_path_factory):
    """What each line of the page printed, in a folder of its own; NeMo's in two processes, as the recipe has."""
    folder = tmp_path_factory.mktemp("walk")
    printed = []
    for line in LINES:
        if line.startswith("nemo "):
            printed.append(workers.run(nemo_job, line, str(folder), str(shards), ranks=2, fit=True)[0])
            continue
        words = [*molmo2, *shlex.split(line.removeprefix("molmo2 "))]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=env)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        printed.append(done.stdout + done.stderr)
    return folder, printed


def test_the_page_has_the_lines_that_are_checked():
    assert [line.split()[:3] for line in LINES] == [
        *(["nemo", "llm", "train"], ["nemo", "llm", "train"], ["molmo2", "status", "runs/nemo"]),
        *(["nemo", "llm", "finetune"], ["molmo2", "report", "runs/nemo"]),
    ]


def test_nemos_line_makes_a_run_that_our_commands_read(walked):
    folder, (dry, _, status, again, _) = walked
    assert "molmo2_nemo.launch.nemo_command:train" in dry and "Molmo2Module" in dry
    assert "sft" in status and "4/4" in status and "finished" in status
    assert "trainer.max_steps=6: taken as stage.max_steps=6" in again
    assert "from here on the learning rates follow the longer schedule" in again
    stage = folder / "runs" / "nemo" / "sft"
    steps = [json.loads(line)["step"] for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {"config.yaml", "summary.json", "attempt.json"} <= {path.name for path in stage.iterdir()}
    assert list((folder / "runs" / "nemo").glob("*.html"))
