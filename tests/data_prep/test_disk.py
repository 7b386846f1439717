"""The room that a data set takes, said before it is prepared."""

import io
import json
import shutil

import pytest
from PIL import Image

from data_prep import disk
from data_prep.disk import published_bytes, room_line
from data_prep.progress import RichProgress
from molmo2_nemo.cli.main import main


@pytest.fixture
def free(monkeypatch):
    """Sets the free bytes of every disk."""

    def of(count):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, count))

    return of


def test_said_where_it_takes_more_than_half_of_what_is_free(free, tmp_path):
    free(10 * 10**9)
    assert room_line(4.9e9, "x", tmp_path) == ""
    assert (
        room_line(6e9, "x", tmp_path / "not" / "yet")
        == f"about 6.0 GB (x); 10.0 GB are free in {tmp_path}: little is left then"
    )
    assert room_line(60e9, "x", tmp_path).endswith("it does not fit")


def test_archives_of_published_sets():
    assert published_bytes("okvqa")[0] == 19e9, "COCO's pictures of 2014: 13 and 6 GB"
    assert published_bytes("tulu4")[0] == published_bytes("no such set")[0] == 0


def test_own_data_by_their_first_records(free, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "SAMPLED", 4)
    for n in range(10):
        Image.effect_noise((100, 100), 90).save(f"{n}.png")
    size = sum((tmp_path / f"{n}.png").stat().st_size for n in range(2)) / 4 + disk.TEXT
    lines = [{"image": f"{n // 2}.png", "question": f"q{n}", "answer": "a"} for n in range(20)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = []
    monkeypatch.setattr(RichProgress, "room", lambda self, words: said.append(words))
    free(int(20 * size * 1.5))
    assert main(["prepare", "own.jsonl", "--out", "o", "--workers", "0"]) == 0
    (words,) = said
    assert words.startswith(f"about {20 * size / 1e9:.1f} GB (by the first 4 of 20 records)")
    assert main(["prepare", "own.jsonl", "--out", "o", "--workers", "0"]) == 0 and len(said) == 1, (
        "nothing is to be written"
    )
    free(10**12)
    assert main(["prepare", "own.jsonl", "--out", "p", "--workers", "0"]) == 0 and len(said) == 1


def test_files_that_hold_their_media_are_not_read_through(free, tmp_path, monkeypatch, capsys):
    """A tar's records are as large as the tar, whatever its first ones are."""
    import webdataset

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "SAMPLED", 2)
    with webdataset.TarWriter(str(tmp_path / "own.tar")) as tar:
        for n in range(5):
            tar.write({"__key__": f"{n}", "png": noise(20 * (n + 1)), "txt": "a picture"})
    size = (tmp_path / "own.tar").stat().st_size
    said = []
    monkeypatch.setattr(RichProgress, "room", lambda self, words: said.append(words))
    free(int(1.5 * size))
    assert main(["prepare", "own.tar", "--out", "o", "--workers", "0"]) == 0
    assert said[0].startswith(f"about {size / 1e9:.1f} GB (the size of its files)")


def noise(side):
    file = io.BytesIO()
    Image.effect_noise((side, side), 90).save(file, "PNG")
    return file.getvalue()
