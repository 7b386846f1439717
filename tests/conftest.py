"""Fixtures that several test folders share, and what they say about the tests that use them."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from tests.support.thorough import THOROUGH

# Fixtures that start trainers. Tests that use one are marked `trainer`; make test-fast leaves them out.
TRAINERS = ("workers", "molmo2", "slurm", "finished_demo")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's commands in the background have it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """What trains comes first, as it takes the longest; `pytest -n 2 --dist loadfile` hands files out in this order."""
    for item in items:
        if any(name in item.fixturenames for name in TRAINERS):
            item.add_marker("trainer")
        if item.get_closest_marker("thorough") and not THOROUGH:
            item.add_marker(pytest.mark.skip(reason="as another test, on another layout: make test-thorough"))
    training = {item.path for item in items if item.get_closest_marker("trainer")}
    items.sort(key=lambda item: item.path not in training)


@pytest.fixture(scope="session", autouse=True)
def _shared_folder(tmp_path_factory):
    """Tells tests.support.shards where; the processes of `pytest -n` have their own folders in one that they share."""
    from tests.support.shards import RUN

    base = tmp_path_factory.getbasetemp()
    os.environ[RUN] = str(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(scope="session")
def shards(_shared_folder):
    """The demo's three data sets: a folder with pretrain, sft and long. Not to be changed."""
    from tests.support.shards import demo_shards

    return demo_shards()


@pytest.fixture(scope="session")
def workers(_shared_folder):
    """Four warm processes with NeMo imported; `workers.run(function, *args, ranks=n)`."""
    from tests.support.pool import Pool

    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def molmo2():
    """The user's command, for a process of its own: words to which the verb and its arguments are added."""
    return [sys.executable, "-m", "molmo2_nemo.cli.main"]


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone."""
    import torch.distributed as dist

    if dist.is_initialized():
        yield dist.group.WORLD
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
