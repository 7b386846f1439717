"""Indexing tars that somebody else wrote."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from data_prep.index import main
from molmo2_nemo.data.manifest import MANIFEST, read_head


def tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


RECORD = {"images": ["0.jpg"], "annotations": [{"style": "user_qa", "question": "What?", "answer": "That."}]}


def test_a_record_without_its_picture_is_refused(tmp_path, capsys):
    """Known before any training: there is no manifest, so no run begins with it."""
    whole = {"a.json": json.dumps(RECORD).encode(), "a.0.jpg": b"picture"}
    tar(tmp_path / "x-000000.tar", whole | {"b.json": json.dumps(RECORD).encode()})
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "x-000000.tar:b" in error and ".0.jpg is missing" in error
    assert not (tmp_path / MANIFEST).exists()
    tar(tmp_path / "x-000000.tar", whole)
    assert main([str(tmp_path)]) == 0
    assert read_head(tmp_path / MANIFEST)["records"] == 1


@pytest.mark.parametrize("content", [b"", b"not a tar"])
def test_no_tar(tmp_path, capsys, content):
    if content:
        (tmp_path / "x-000000.tar").write_bytes(content)
    assert main([str(tmp_path)]) == 1
    assert "error:" in capsys.readouterr().err
