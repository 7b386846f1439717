"""Commands run in the tests' own process: what they hide of the libraries' messages is shown again after each test."""

from __future__ import annotations

import logging
import os

import pytest


@pytest.fixture(autouse=True)
def _messages_as_they_were():
    level, filters = logging.root.manager.disable, os.environ.get("PYTHONWARNINGS")
    yield
    logging.disable(level)
    if filters is None:
        os.environ.pop("PYTHONWARNINGS", None)
