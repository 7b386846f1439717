"""A checkpoint that this Megatron-core cannot read."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from molmo2_nemo import compat
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.errors import ConversionError, UserError
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.settings.run import CheckpointConfig
from molmo2_nemo.training.checkpoints import not_written, reading, thin_out


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
    assert not_written(failed.value, checkpoint.parent) is None


def system_error(kind: int, path: str | None) -> OSError:
    return OSError(kind, os.strerror(kind), path)


@pytest.fixture
def stage(tmp_path):
    """A stage's folder with one whole checkpoint."""
    folder = tmp_path / "checkpoints" / "step=3"
    folder.mkdir(parents=True)
    (folder / "a").write_text("x")
    checkpoint_manifest.write(folder, checkpoint_manifest.describe(folder, checkpoint_manifest.share(folder, 0, 1)))
    return tmp_path


KEPT = "step=3 is whole, and the same command resumes from it"


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("file", ["metrics.jsonl", "checkpoints/step=6/weights/a", None])
def test_a_full_disk_is_told_with_path_and_what_is_kept(stage, kind, file):
    said = not_written(system_error(kind, file and f"{stage}/{file}"), stage)
    what = f"{stage}/metrics.jsonl" if file == "metrics.jsonl" else f"a checkpoint in {stage}/checkpoints"
    assert isinstance(said, UserError) and str(said).startswith(
        f"{what} could not be written ({os.strerror(kind)}). Its"
    )
    assert re.search(r"Its disk has [\d.]+ GiB left; is it full, or is a quota used up\? /", str(said))
    assert str(said).endswith(KEPT)


def test_a_folder_that_may_only_be_read(stage):
    said = not_written(system_error(errno.EROFS, f"{stage}/validation.jsonl"), stage)
    assert isinstance(said, UserError)
    assert str(said) == (
        f"{stage}/validation.jsonl could not be written (Read-only file system). Allow this user to write there. "
        f"{stage}/checkpoints/{KEPT}"
    )


def test_a_mount_that_does_not_answer_is_worth_another_try(stage):
    said = not_written(system_error(errno.ESTALE, f"{stage}/metrics.jsonl"), stage)
    assert type(said) is RuntimeError and "is its file system still mounted? /" in str(said) and KEPT in str(said)
    gone = stage / "gone"
    said = not_written(system_error(errno.ENOENT, f"{gone}/metrics.jsonl"), gone)
    assert type(said) is RuntimeError and str(said).startswith(f"the run's folder {gone} could not be written (")
    assert str(said).endswith("is its file system still mounted? what was saved before cannot be seen")


def test_files_of_others_keep_their_own_words(stage):
    for kind, path in ((errno.ENOSPC, "/dev/shm/x"), (errno.EACCES, "/data/a.tar"), (errno.EACCES, None)):
        assert not_written(system_error(kind, path), stage) is None
    assert not_written(system_error(errno.ENOENT, f"{stage}/absent"), stage) is None


def saved(folder: Path, *steps: int) -> None:
    for step in steps:
        place = folder / f"step={step}"
        (place / "weights").mkdir(parents=True)
        (place / "weights" / "a").write_text("values")
        files = checkpoint_manifest.share(place, 0, 1)
        checkpoint_manifest.write(place, checkpoint_manifest.describe(place, files))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_goes_that_a_run_would_fall_back_to(tmp_path):
    """A newer one that is damaged counts for nothing; multiples of keep_every stay, in which other stages began."""
    saved(tmp_path, 2, 4, 6, 8)
    (tmp_path / "step=8" / "weights" / "a").write_text("cut")
    thin_out(tmp_path, CheckpointConfig(keep_last=1, keep_every=4))
    assert left(tmp_path) == ["step=4", "step=6", "step=8"]
    (tmp_path / "step=6" / "manifest.json").unlink()
    thin_out(tmp_path, CheckpointConfig(keep_last=1, keep_every=None))
    assert left(tmp_path) == ["step=4", "step=6", "step=8"]
    assert checkpoint_manifest.newest_whole(tmp_path) == tmp_path / "step=4"
    saved(tmp_path, 10)
    thin_out(tmp_path, CheckpointConfig(keep_last=1, keep_every=None))
    assert left(tmp_path) == ["step=10", "step=6", "step=8"]
