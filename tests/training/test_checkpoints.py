"""A checkpoint that this Megatron-core cannot read."""

from __future__ import annotations

import json

import pytest

from molmo2_nemo import compat
from molmo2_nemo.errors import UserError
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.training.checkpoints import naming_versions


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step=3"
    folder.mkdir()
    checkpoint_manifest.write(folder, {})
    return folder


def written_by(folder, version):
    path = folder / checkpoint_manifest.MANIFEST
    values = json.loads(path.read_text())
    values["stack"]["megatron-core"] = version
    path.write_text(json.dumps(values))


def test_the_manifest_names_what_wrote_it(checkpoint):
    assert checkpoint_manifest.written_with(checkpoint) == compat.versions()
    assert compat.versions()["megatron-core"] == compat.installed("megatron-core")


def test_a_later_version_is_named_with_ours(checkpoint):
    written_by(checkpoint, "0.99.1")
    with pytest.raises(UserError, match=r"0\.99\.1.*KeyError: 'common'") as failed, naming_versions(checkpoint):
        raise KeyError("common")
    assert compat.installed("megatron-core") in str(failed.value) and str(checkpoint) in str(failed.value)


@pytest.mark.parametrize("version", ["0.16.0", None])
def test_other_failures_stay_what_they_are(checkpoint, version):
    """Of an equal or earlier version, or of a checkpoint that does not say."""
    if version is None:
        (checkpoint / checkpoint_manifest.MANIFEST).unlink()
    else:
        written_by(checkpoint, version)
    with pytest.raises(KeyError), naming_versions(checkpoint):
        raise KeyError("common")
