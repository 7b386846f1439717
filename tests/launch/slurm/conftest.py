"""A Slurm for the tests of this folder."""

from __future__ import annotations

import os

import pytest

from tests.launch.slurm.cluster import Cluster, build_plugin, why_not

SWITCH = "MOLMO2_SLURM_TESTS"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running cluster of two nodes with two pretended GPUs each."""
    if os.environ.get(SWITCH) != "1":
        pytest.skip(f"costs minutes: make test-slurm, or {SWITCH}=1")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder, build_plugin(folder))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
