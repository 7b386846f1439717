"""A line that the disk has no room for is an error that names the file, also where a part of it fitted."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from molmo2_nemo.rundir.attempt import note_error
from molmo2_nemo.rundir.lines import append_line, read_lines


def test_no_room_for_the_second_half_of_a_line(tmp_path):
    """The system takes what fits and reports that as a success."""
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        with pytest.raises(OSError) as failed:
            append_line(path, {"step": 2})
        note_error(tmp_path, {"time": 1.0, "message": "x" * 99})  # must not hide the error that it is about
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert failed.value.errno == errno.EFBIG and failed.value.filename == str(path)
    append_line(path, {"step": 3})
    assert read_lines(path, step=int) == [{"step": 1}, {"step": 3}]


def test_a_full_disk_is_named():
    with pytest.raises(OSError) as failed:
        append_line(Path("/dev/full"), {"step": 1})
    assert failed.value.errno == errno.ENOSPC and failed.value.filename == "/dev/full"
