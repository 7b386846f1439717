"""Where what lies in a run's folder."""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.rundir import paths
from molmo2_nemo.settings import ranges
from molmo2_nemo.settings.run import RunConfig


def test_stages_and_jobs_do_not_meet():
    cfg = RunConfig(output_dir="runs/a")
    assert (paths.stage_dir(cfg), paths.slurm_dir(cfg)) == (Path("runs/a/sft"), Path("runs/a/slurm"))
    cfg.stage.name = paths.SLURM
    assert any(problem.startswith("stage.name=slurm: ") for problem in ranges.out_of_range(cfg))
