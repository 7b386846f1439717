"""Fixtures that several test folders share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def workers():
    """Four warm processes with NeMo imported; `workers.run(function, *args, ranks=n)`."""
    from tests.support.pool import Pool

    pool = Pool(4)
    yield pool
    pool.close()
