"""What every test of object stores has."""

import pytest

from molmo2_nemo.data.config import StoreConfig
from molmo2_nemo.data.objects import files as remote
from molmo2_nemo.data.objects import store as requests_module
from molmo2_nemo.data.objects import traffic


@pytest.fixture
def retries():
    """Further tries of a request that fails."""
    return 2


@pytest.fixture(autouse=True)
def options(tmp_path, monkeypatch, retries):
    """Every test has a cache of its own, and does not wait long between two tries."""
    monkeypatch.setattr(requests_module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "_listed", {})
    monkeypatch.setattr(remote, "_silent", {})
    before, made = remote.options_in_use(), StoreConfig(cache=str(tmp_path / "cache"), retries=retries, timeout=5.0)
    traffic.take()
    remote.use(made)
    yield made
    remote.use(before)
