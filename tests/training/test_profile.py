"""Profiles of a few steps: trace, table, and what ends them early."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from molmo2_nemo.errors import UserError
from molmo2_nemo.settings.checks import profile_problems
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.training.kernel_kinds import KINDS
from molmo2_nemo.training.profile import Profile, Row, StepProfiler, covered, described


def marks(trace: Path) -> list[str]:
    """Marks of steps in a trace."""
    with gzip.open(trace, "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    return sorted({name for name in names if name.startswith("training step ")})


def profiled(cfg, packs) -> list[dict]:
    """Job: metrics of a run that profiles."""
    from tests.support.packs import train_on_packs

    return train_on_packs(cfg, packs)


def test_trainer_profiles_the_steps_it_is_told_to(workers, tmp_path):
    from tests.support.packs import demo_packs, tiny_run

    packs = demo_packs(8)
    plain, cfg = tiny_run(tmp_path / "plain", 3), tiny_run(tmp_path / "run", 3, context=2)
    plain.parallel.context, cfg.log.profile, cfg.log.profile_ranks = 2, [2, 3], [0, 1]
    expected = workers.run(profiled, plain, packs, ranks=2, fit=True)[0]
    found = workers.run(profiled, cfg, packs, ranks=2, fit=True)[0]
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    folder = tmp_path / "run" / "sft" / "profile"
    names = {f"steps-2-3{rank}.{end}" for rank in ("", ".rank-1") for end in ("txt", "trace.json.gz")}
    assert {path.name for path in folder.iterdir()} == names
    assert marks(folder / "steps-2-3.trace.json.gz") == ["training step 2", "training step 3"]
    table = (folder / "steps-2-3.txt").read_text()
    assert table.startswith("steps 2 to 3 of sft, rank 0: ")
    shares = {kind: float(share) for share, kind in re.findall(rf"([\d.]+)% +\d+  ({'|'.join(KINDS)})$", table, re.M)}
    assert {"attention", "matrix products", "communication", "optimizer"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)


def test_a_stop_keeps_the_steps_before_it(tmp_path):
    profiler = StepProfiler(tmp_path, 2, 9, 0, "sft")
    for step in (1, 2, 3):
        profiler.begin(step)
        torch.ones(64, 64) @ torch.ones(64, 64)
        assert profiler.end(step) is None
    profiler.begin(4)  # what ends the run comes in this one
    text = profiler.close() or ""
    assert "steps 2 to 3 of sft" in text and "for 2 steps" in text
    assert {path.name for path in tmp_path.iterdir()} == {"steps-2-3.txt", "steps-2-3.trace.json.gz"}
    assert profiler.close() is None and profiler.end(4) is None


def test_a_stop_in_the_first_step_leaves_nothing(tmp_path):
    profiler = StepProfiler(tmp_path, 2, 3, 0, "sft")
    profiler.begin(2)
    assert profiler.close() is None
    assert not list(tmp_path.iterdir())
    with torch.profiler.profile():  # none is open any more
        torch.ones(1)


def test_busy_time_counts_kernels_that_overlap_once():
    assert covered([]) == 0
    assert covered([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7


def test_what_a_device_did_is_said():
    kernels = [Row("nvjet_tst_128x256_64x4", 60.0, 4), Row("void pytorch_flash::flash_fwd_kernel", 30.0, 2)]
    text = described(Profile(True, 2, 100.0, 80.0, 7.0, 3, kernels))
    first, _, matrix, attention, _, largest, _ = text.split("\n")
    assert first == "100 ms for 2 steps; device busy 80 ms (80%), idle 20 ms; the host waited 7 ms for it, 3 times"
    assert matrix.split() == ["60.0", "66.7%", "4", "matrix", "products"] and attention.split()[1] == "33.3%"
    assert largest.endswith("nvjet_tst_128x256_64x4  [matrix products]")


@pytest.mark.parametrize(
    ("steps", "ranks", "problem"),
    [
        ([3], [0], "expected two step numbers"),
        ([0, 2], [0], "counted from 1"),
        ([5, 3], [0], r"did you mean \[3,5\]"),
        ([3, 11], [0], "ends after step 10"),
        ([3, 5], [2], "there is no rank 2; name some of 0 to 1"),
        ([3, 5], [], "no rank would write one"),
    ],
)
def test_steps_and_ranks_that_cannot_be(steps, ranks, problem):
    cfg = RunConfig()
    cfg.stage.max_steps, cfg.parallel.data, cfg.log.profile, cfg.log.profile_ranks = 10, 2, [1, 10], [0, 1]
    assert not list(profile_problems(cfg))
    cfg.log.profile, cfg.log.profile_ranks = steps, ranks
    with pytest.raises(UserError, match=problem):
        for found in profile_problems(cfg):
            raise UserError(found)
