"""Fixtures that several test folders share."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest


@functools.cache
def uses_pool(path: str) -> bool:
    """Whether tests of a file, relative to the project, run in the pool of `workers`."""
    return "workers.run(" in (Path(__file__).parent.parent / path).read_text()


def pytest_collection_modifyitems(items):
    """What needs the pool comes first: it takes the longest."""
    items.sort(key=lambda item: not uses_pool(item.nodeid.split("::")[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `pytest -n`, one process has all files that need the pool, so that there is one pool."""
    from xdist.scheduler import LoadScopeScheduling

    class OnePool(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return "pool" if uses_pool(path) else path

    return OnePool(config, log)


@pytest.fixture(scope="session")
def workers():
    """Four warm processes with NeMo imported; `workers.run(function, *args, ranks=n)`."""
    from tests.support.pool import Pool

    pool = Pool(4)
    yield pool
    pool.close()
