"""Atomic files: whole or not at all, whoever writes, and nothing left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from molmo2_nemo.files import atomic, write_json, write_text


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": "ä"}, indent=None)
    assert json.loads(path.read_text()) == {"b": "ä"} and path.read_text().endswith("\n")
    write_text(path, "ä\n", sync=True)
    assert path.read_bytes() == "ä\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_old_file_stays_when_the_block_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as part:
        part.write_text("ha")
        assert part.parent == path.parent and path.read_text() == "old"
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("folder", ["missing", "file", "file/below", "x" * 300])
def test_errors_name_the_file_and_not_the_part(tmp_path, folder):
    (tmp_path / "file").write_text("")
    path = tmp_path / folder / "a.txt"
    with pytest.raises(OSError) as raised:
        write_text(path, "a")
    assert raised.value.filename == str(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's full disk")
def test_a_full_disk_names_the_file(tmp_path):
    with (
        pytest.raises(OSError, match="No space left") as raised,
        atomic(tmp_path / "a.txt"),
        open("/dev/full", "w") as f,
    ):
        f.write("a")
        f.flush()
    assert raised.value.filename == str(tmp_path / "a.txt")


def test_several_writers_of_one_file(tmp_path):
    path = tmp_path / "a.txt"
    contents = [letter * 200_000 for letter in "abcd"]
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in contents for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in contents and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom molmo2_nemo.files import atomic\n"
        "with atomic(Path(sys.argv[1])) as part:\n"
        "    part.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode < 0 and path.read_text() == "old"
