"""When a checkpoint counts as whole."""

from __future__ import annotations

import pytest

from molmo2_nemo.rundir import checkpoint_manifest


def checkpoint(folder, step, files=("weights/a.distcp", "weights/b.distcp", "weights/common.pt")):
    """As a save leaves it: files of different sizes, then the manifest."""
    path = folder / f"step={step}"
    for number, name in enumerate(files):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(bytes([step]) * (100 + number))
    parts = [checkpoint_manifest.describe(path, checkpoint_manifest.share(path, rank, 2)) for rank in range(2)]
    assert all(parts)  # both ranks read something
    checkpoint_manifest.write(path, parts[0] | parts[1])
    return path


def test_a_whole_one(tmp_path):
    path = checkpoint(tmp_path, 5)
    (path / "context").mkdir()
    (path / "context" / "model.yaml").write_text("what is added later does not matter")
    assert checkpoint_manifest.damage(path, sums=True) == []
    assert sorted(checkpoint_manifest.read(path)) == ["weights/a.distcp", "weights/b.distcp", "weights/common.pt"]


@pytest.mark.parametrize(
    ("damage", "said", "cheap"),
    [
        (lambda p: (p / "weights/a.distcp").unlink(), "weights/a.distcp is missing", True),
        (lambda p: (p / "weights/a.distcp").write_bytes(b"cut"), "weights/a.distcp has 3 bytes, not 100", True),
        (lambda p: (p / "weights/a.distcp").write_bytes(b"x" * 100), "weights/a.distcp has changed", False),
        (lambda p: (p / checkpoint_manifest.MANIFEST).unlink(), "no readable manifest.json", True),
        (lambda p: (p / checkpoint_manifest.MANIFEST).write_text('{"files": '), "no readable manifest.json", True),
    ],
)
def test_damage_is_named(tmp_path, damage, said, cheap):
    """Changed contents are seen by the rank whose share they are, and only if sums are compared."""
    path = checkpoint(tmp_path, 5)
    damage(path)
    assert bool(checkpoint_manifest.damage(path)) == cheap
    found = [checkpoint_manifest.damage(path, sums=True, rank=rank, size=2) for rank in range(2)]
    assert any(fault.startswith(said) for part in found for fault in part)
    if not cheap:
        assert sorted(map(len, found)) == [0, 1]


def test_newest_first_and_unfinished_ones_left_out(tmp_path):
    paths = {step: checkpoint(tmp_path, step) for step in (9, 10, 100)}
    (tmp_path / "step=9 (copy)").mkdir()
    (tmp_path / "step=100-unfinished").touch()  # NeMo's mark, as a kill during saving leaves it
    assert checkpoint_manifest.finished(tmp_path) == [paths[10], paths[9]]
    assert checkpoint_manifest.newest_whole(tmp_path) == paths[10]
    (paths[10] / "weights" / "common.pt").write_bytes(b"")
    assert checkpoint_manifest.newest_whole(tmp_path) == paths[9]
    (tmp_path / "step=9-unfinished").touch()
    assert checkpoint_manifest.newest_whole(tmp_path) is None
