"""What several tests of evaluation share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.judge_server import Server, judge_server


@pytest.fixture
def server() -> Iterator[Server]:
    """A judge that answers by rule."""
    with judge_server() as server:
        yield server
