"""NeMo's own launcher on a real Slurm: the lines of docs/nemo.md for the tiny recipe, as they stand but for the
partition's name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from molmo2_nemo.rundir.summary import read_summary
from tests.launch.slurm.cluster import wait_for

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "nemo.md").read_text()


def test_one_line_submits_a_job(slurm, shards, tmp_path):
    found = re.search(r"^export NEMORUN_HOME.*?gpus_per_node=null$", PAGE, re.M | re.S)
    assert found is not None and "partition=cpu" in found[0]
    lines = found[0].replace("partition=cpu", "partition=main")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**slurm.env, "PATH": path, "PYTHONPATH": str(ROOT), "MOLMO2_DEMO_DATA": str(shards)}
    env["MASTER_ADDR"] = "127.0.0.1"
    done = subprocess.run(["bash", "-ec", lines], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def log() -> str:
        files = [p for p in (tmp_path / "nemo_jobs").rglob("*.out") if p.is_file()]
        return "\n".join(f"--- {p}\n{p.read_text(errors='replace')[-3000:]}" for p in files) + slurm.logs()

    stage = tmp_path / "runs" / "slurm" / "sft"
    summary = wait_for(lambda: read_summary(stage), 600, "the job's stage to be finished", log)
    assert summary["steps"] == 4 and summary["layout"] == "TP2+SP" and (stage / "config.yaml").is_file()
