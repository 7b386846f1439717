"""The demo's shards, built once for all tests of a run, in however many processes they are."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

RUN = "MOLMO2_TEST_RUN"  # folder that all processes of a test run share; set by conftest.py


def demo_shards() -> Path:
    """A folder with the data sets pretrain, sft and long. Tests read it; what they change they copy first."""
    from data_prep.demo import build_demo

    base = Path(os.environ[RUN])
    folder, part = base / "demo-shards", base / "demo-shards.part"
    with (base / "demo-shards.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            build_demo(part)
            part.rename(folder)
    return folder
