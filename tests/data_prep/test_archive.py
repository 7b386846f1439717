"""Archives: what is inside comes out, and nothing leaves the target."""

import io
import tarfile
import zipfile

import pytest

from data_prep import archive
from data_prep.archive import ArchiveError, unpack


def make_tar(path, *members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content, *kind in members:
            info = tarfile.TarInfo(name)
            if kind:
                info.type, info.linkname = kind
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content, *mode in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if mode:
                info.external_attr = mode[0] << 16
            file.writestr(info, content)
    return path


@pytest.mark.parametrize("make, name", [(make_tar, "x.tar.gz"), (make_zip, "x.zip")])
def test_members_come_out(tmp_path, make, name):
    path = make(tmp_path / name, ("a/b.jpg", b"one"), ("./c.mp4", b"two"))
    folder = unpack(path, tmp_path / "out" / "x")
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        "a/b.jpg": b"one",
        "c.mp4": b"two",
    }
    path.unlink()
    assert unpack(path, folder) == folder, "once is enough"


HOSTILE = {
    "absolute": [("/tmp/x", b"x")],
    "climbing": [("a/../../x", b"x")],
    "backslash": [("..\\x", b"x")],
    "drive": [("C:x", b"x")],
    "twice": [("a", b"x"), ("a", b"y")],
    "file and folder": [("a", b"x"), ("a/b", b"y")],
}


@pytest.mark.parametrize("make, suffix", [(make_tar, "tar.gz"), (make_zip, "zip")])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names(tmp_path, make, suffix, kind):
    path = make(tmp_path / f"x.{suffix}", ("fine", b"x"), *HOSTILE[kind])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ArchiveError, OSError)):
        unpack(path, tmp_path / "deep" / "out")
    left = [p for p in sorted(tmp_path.rglob("*")) if p not in before]
    assert {p.name for p in left} <= {"deep", ".out.lock"}, "nothing is left, inside or outside"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tars(tmp_path, kind):
    path = make_tar(tmp_path / "x.tar.gz", ("fine", b"x"), ("link", b"", kind, "/etc/passwd"), ("link/y", b"x"))
    with pytest.raises(ArchiveError, match="link or device"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_in_zips(tmp_path):
    with pytest.raises(ArchiveError, match="link or device"):
        unpack(make_zip(tmp_path / "x.zip", ("link", b"/etc/passwd", 0o120777)), tmp_path / "out")


def test_bombs_and_damage(tmp_path, monkeypatch):
    bomb = make_zip(tmp_path / "bomb.zip", ("zeros", bytes(3_000_000)))
    with pytest.raises(ArchiveError, match="unpacks to more than"):
        unpack(bomb, tmp_path / "a", max_bytes=1_000_000)
    monkeypatch.setattr(archive, "RATIO_FROM", 1_000_000)
    with pytest.raises(ArchiveError, match="unpacks to more than"):
        unpack(bomb, tmp_path / "a")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 2)
    with pytest.raises(ArchiveError, match="more than 2 members"):
        unpack(make_zip(tmp_path / "many.zip", *((str(i), b"x") for i in range(3))), tmp_path / "a")
    for name, content in (("cut.zip", bomb.read_bytes()[:300]), ("no.tar", b"not an archive"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArchiveError, match="damaged"):
            unpack(tmp_path / name, tmp_path / "a")
    assert not (tmp_path / "a").exists()
