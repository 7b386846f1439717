"""A checkpoint that this Megatron-core cannot read."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from molmo2_nemo import compat
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.errors import ConversionError, UserError
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.training.checkpoints import not_written, reading


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step=3"
    folder.mkdir()
    checkpoint_manifest.write(folder, {})
    return folder


def written_by(folder, version, name="megatron-core"):
    path = folder / checkpoint_manifest.MANIFEST
    values = json.loads(path.read_text())
    values["stack"][name] = version
    path.write_text(json.dumps(values))


def test_the_manifest_names_what_wrote_it(checkpoint):
    assert checkpoint_manifest.written_with(checkpoint) == compat.versions()
    assert compat.versions()["megatron-core"] == compat.installed("megatron-core")


@pytest.mark.parametrize("name", ["megatron-core", "torch"])
@pytest.mark.parametrize("version", ["0.99.1", "0.5.0"])
def test_another_version_is_named_with_ours(checkpoint, version, name):
    written_by(checkpoint, version, name)
    with pytest.raises(UserError, match=f"{version}.* is installed here") as failed, reading(checkpoint):
        raise KeyError("common")
    assert f"{name} {version}, and {compat.installed(name)} is" in str(failed.value)
    assert str(checkpoint) in str(failed.value)
    assert "KeyError: 'common'" in str(failed.value)


@pytest.mark.parametrize("version", [compat.installed("megatron-core"), None, "dev", 5])
def test_other_failures_stay_what_they_are(checkpoint, version):
    """Of an equal version, or of a checkpoint that does not say."""
    if version is None:
        (checkpoint / checkpoint_manifest.MANIFEST).unlink()
    else:
        written_by(checkpoint, version)
    with pytest.raises(KeyError), reading(checkpoint):
        raise KeyError("common")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), PermissionError("no"), UserError("x")])
def test_what_has_nothing_to_do_with_contents_is_passed_on(checkpoint, error):
    written_by(checkpoint, "0.99.1")
    with pytest.raises(type(error)) as passed, reading(checkpoint):
        raise error
    assert passed.value is error


def test_metadata_of_a_later_torch_is_not_called_damaged(checkpoint):
    """torch 2.15 stores more of a tensor than earlier ones take."""
    weights = checkpoint / "weights"
    weights.mkdir()
    (weights / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (weights / ".metadata").write_bytes(b"not what is expected")
    with pytest.raises(ConversionError, match="is damaged"):
        MegatronCheckpoint(checkpoint)
    written_by(checkpoint, "99.1.0", "torch")
    with pytest.raises(ConversionError, match=f"torch 99.1.0, and {re.escape(compat.installed('torch'))} is installed"):
        MegatronCheckpoint(checkpoint)


def test_what_a_checkpoint_lacks_is_not_taken_for_a_full_disk(checkpoint):
    with pytest.raises(UserError, match=r"step=3 cannot be read \(CheckpointException: 'Missing key common'") as failed:
        with reading(checkpoint):
            raise CheckpointException("load", {0: (KeyError("Missing key common"), None)})
    assert not_written(failed.value, checkpoint) is None
