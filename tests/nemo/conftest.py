"""Fixtures of the trainer's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """The demo's three data sets as shards: a folder with pretrain, sft and long."""
    from data_prep.demo import build_demo

    folder = tmp_path_factory.mktemp("shards")
    build_demo(folder)
    return folder
