"""molmo2 shards index: tars that other tools wrote, read as the webdataset library reads them; bad records left out."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import demo
from data_prep.shard_repair import repair
from data_prep.shard_tools import check
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import DataConfig, ImageConfig, SourceConfig, VideoConfig
from molmo2_nemo.data.foreign import ForeignTexts
from molmo2_nemo.data.loader import ExampleReader, default_builder
from molmo2_nemo.data.manifest import MANIFEST, read_entries, read_head
from molmo2_nemo.data.record import BadRecord, parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tar_index import index_tar
from molmo2_nemo.data.tar_manifest import write_manifest
from molmo2_nemo.errors import UserError


def picture(side, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, kind)
    return file.getvalue()


RECORD = json.dumps(
    {"images": ["0.png"], "annotations": [{"style": "user_qa", "question": "?", "answer": "."}]}
).encode()
GOOD = {"a.json": RECORD, "a.0.png": picture(30)}


def tar(path, members, fmt=tarfile.USTAR_FORMAT, pax=None):
    """`members`: name -> bytes, or None for a folder; a list of pairs where names repeat."""
    with tarfile.open(path, "w", format=fmt) as out:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.pax_headers = dict(pax or {})
            if data is None:
                info.type = tarfile.DIRTYPE
                out.addfile(info)
                continue
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def index(folder, *options):
    return main(["shards", "index", str(folder), *options])


def keys(folder):
    data = ShardDataset(folder)
    return [data.read(i)[0] for i in range(len(data))]


# --- as webdataset reads them ---------------------------------------------------------------------------------------


def by_webdataset(path):
    """key -> suffix -> bytes, without a leading `./`; but not the records that it makes of hidden files in folders."""
    found = {}
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        key = sample.pop("__key__").removeprefix("./")
        if not key.endswith("/"):
            found[key] = {name: data for name, data in sample.items() if not name.startswith("__")}
    return found


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_records_are_those_of_the_webdataset_library(tmp_path, fmt):
    """Tars as `tar cf x.tar .`, macOS and Python make them: every mix of folders, `./`, hidden files and odd names."""
    random = np.random.default_rng(0)
    for _ in range(60):
        prefix = random.choice(["", "./", "set/", "./set/", "a.b/"])
        members: list[tuple[str, bytes | None]] = []
        if random.random() < 0.5:
            members.append((prefix.rstrip("/") or ".", None))
        for number in range(random.integers(1, 5)):
            for i, suffix in enumerate(random.choice(["jpg", "json", "JPG.txt", "cls", "0.png"], 2, replace=False)):
                torn = i > 0 and prefix not in ("", "./")  # in folders, the library tears a record apart at such a file
                if random.random() < 0.3 and not torn:
                    members.append((f"{prefix}._r{number}.{suffix}", b"junk"))
                members.append((f"{prefix}r{number}.{suffix}", random.bytes(random.integers(0, 700))))
            if random.random() < 0.2:
                members.append((str(random.choice(["README", "__meta__", "__index__/x.json", ".DS_Store"])), b"x"))
        path = tmp_path / "x.tar"
        tar(path, members, fmt)
        expected, content = by_webdataset(path), path.read_bytes()
        found = {
            key: {m.suffix: content[m.offset : m.offset + m.size] for m in parts} for key, parts in index_tar(path)
        }
        assert found == expected
        write_manifest(tmp_path, "x")
        data = ShardDataset(tmp_path)
        assert {data.read(i)[0].partition(":")[2]: data.read(i)[1] for i in range(len(data))} == expected


def test_extended_headers_that_change_nothing_are_passed_over(tmp_path):
    """Attributes of macOS may hold any bytes, and so the words that matter elsewhere."""
    odd = "path=x\n12 size=1\n"
    tar(tmp_path / "x.tar", GOOD, tarfile.PAX_FORMAT, {"LIBARCHIVE.xattr.a": odd, "mtime": "1.5"})
    assert index(tmp_path) == 0 and keys(tmp_path) == ["x.tar:a"]


@pytest.mark.parametrize("keyword, value", [("path", "b.json"), ("size", "7")])
def test_extended_headers_that_change_a_member_are_refused(tmp_path, keyword, value, capsys):
    tar(tmp_path / "x.tar", GOOD, tarfile.PAX_FORMAT, {keyword: value})
    assert index(tmp_path) == 2
    assert f"a member's {keyword} is in an extended header" in capsys.readouterr().err


def test_links_are_refused_with_a_way_on(tmp_path, capsys):
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = tarfile.SYMTYPE, "b.json"
        out.addfile(info)
    assert index(tmp_path) == 2 and "tar --dereference" in capsys.readouterr().err


# --- bad records ----------------------------------------------------------------------------------------------------

BAD = {
    "missing": ([("b.json", RECORD)], ".0.png is missing"),
    "empty": ([("b.json", RECORD), ("b.0.png", b"")], ".0.png is empty"),
    "page": ([("b.json", RECORD), ("b.0.png", b"<html>404")], "an HTML page"),
    "no annotations": ([("b.json", b"{}")], "annotations"),
    "no json": ([("b.0.png", picture(20))], "has no .json member"),
    "broken json": ([("b.json", b"{"), ("b.0.png", picture(20))], "cannot be parsed"),
    "code": ([("b.json", RECORD), ("b.0.png", picture(20)), ("b.pkl", b"x")], "may carry code"),
    "twice": ([("b.json", RECORD), ("b.0.png", picture(20)), ("b.0.png", picture(20))], "appears twice"),
    "torn apart": (
        [("b.json", RECORD), ("c.json", RECORD), ("c.0.png", picture(9)), ("b.0.png", picture(9))],
        "adjacent",
    ),
}
FIELDS = {"missing": "images", "empty": "images", "page": "images[0]", "no annotations": "annotations"}
MEMBERS = {**dict.fromkeys(("missing", "empty", "page", "twice", "torn apart"), "b.0.png"), "code": "b.pkl"}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_named_and_left_out(tmp_path, kind, capsys):
    members, words = BAD[kind]
    path = tmp_path / "x-000000.tar"
    tar(path, [*GOOD.items(), *members])
    before = path.read_bytes()
    assert index(tmp_path, "--name", "mine") == 0
    shown = capsys.readouterr().out
    assert "1 left out by index" in shown and "x-000000.tar:b: " in shown and words in shown
    good = [f"x-000000.tar:{key}" for key in ("a", "c") if key == "a" or kind == "torn apart"]
    assert keys(tmp_path) == good and read_head(tmp_path / MANIFEST)["name"] == "mine"
    (line,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert line["key"] == "b" and line["shard"] == "x-000000.tar" and words in line["detail"]
    assert line["member"] == MEMBERS.get(kind, "b.json") and line["seen"] and line["expected"]
    assert line["field"] == FIELDS.get(kind, "")
    assert check(tmp_path) == [] and repair(tmp_path) == [] and path.read_bytes() == before


def test_tars_without_a_good_record(tmp_path, capsys):
    tar(tmp_path / "x.tar", {"b.json": b"{}", "b.0.png": picture(9)})
    assert index(tmp_path) == 2
    error = capsys.readouterr().err
    assert "none of the records" in error and "x.tar:b" in error and "--caption-from txt" in error
    assert not (tmp_path / MANIFEST).exists()
    assert main(["shards", "repair", str(tmp_path)]) == 2 and "shards index" in capsys.readouterr().err
    tar(tmp_path / "y.tar", GOOD)
    assert index(tmp_path) == 0 and keys(tmp_path) == ["y.tar:a"] and check(tmp_path) == []
    (tmp_path / "z.tar").write_bytes((tmp_path / "y.tar").read_bytes())
    assert [(p.shard, p.text) for p in check(tmp_path)] == [("z.tar", "is not listed in the manifest")]


def test_damage_is_left_out_by_repair_and_the_tar_stays(tmp_path, capsys):
    """Somebody else's tars are not rewritten, and their keys may be ones that this project would not write."""
    odd = {"b b.json": RECORD, "b b.0.png": picture(20)}
    tar(tmp_path / "x.tar", GOOD | odd)
    assert index(tmp_path) == 0
    entry = next(iter(read_entries(tmp_path / MANIFEST)))[0]
    content = bytearray((tmp_path / "x.tar").read_bytes())
    content[entry.members[-1].offset + 3] ^= 4
    (tmp_path / "x.tar").write_bytes(content)
    assert {p.key for p in check(tmp_path)} == {"", "a"}
    assert [p.key for p in repair(tmp_path)] == ["a"]
    assert keys(tmp_path) == ["x.tar:b b"] and check(tmp_path) == [] and repair(tmp_path) == []
    assert (tmp_path / "x.tar").read_bytes() == content
    ShardDataset(tmp_path).verify()


def test_errors_of_the_command(tmp_path, capsys):
    assert index(tmp_path) == 2 and "no shards" in capsys.readouterr().err
    assert index(tmp_path / "none") == 2
    (tmp_path / "x.tar").write_bytes(b"not a tar")
    assert index(tmp_path) == 2 and "x.tar" in capsys.readouterr().err
    assert index(tmp_path, "--question-from", "txt") == 2 and "belong together" in capsys.readouterr().err
    assert index(tmp_path, "--caption-from", "a b") == 2 and "expected a member's suffix" in capsys.readouterr().err
    assert index(tmp_path, "--media-from", "jpg") == 2 and "nothing to train on" in capsys.readouterr().err
    assert main(["shards", "check", str(tmp_path), "--caption-from", "txt"]) == 2
    assert "belong to molmo2 shards index" in capsys.readouterr().err


# --- texts elsewhere ------------------------------------------------------------------------------------------------


def image_text(number):
    """As img2dataset writes it."""
    meta = {"url": "https://host/x.jpg", "caption": f"from JSON {number}", "width": 40, "exif": {"by": "me"}}
    key = f"{number:09d}"
    text = f"caption {number}\n"
    return {
        f"{key}.jpg": picture(40 + number, "JPEG"),
        f"{key}.txt": text.encode(),
        f"{key}.json": json.dumps(meta).encode(),
    }


def answers(folder, **settings):
    """(question or prompt, answer) of every record as training builds it."""
    config = DataConfig(
        sources={"set": SourceConfig(str(folder))},
        image=ImageConfig(crop_size=126, margin=2, max_crops=2),
        video=VideoConfig(max_frames=4),
        **settings,
    )
    reader = ExampleReader(config, *default_builder(config))
    found = [reader[n] for n in range(len(reader.datasets["set"]))]
    return sorted(example.info["conversations"][0][0][1] for example in found)


@pytest.mark.parametrize(
    "places, expected",
    [
        (["--caption-from", "txt"], ["caption 0", "caption 1", "caption 2"]),
        (["--caption-from", "json:caption"], ["from JSON 0", "from JSON 1", "from JSON 2"]),
        (["--question-from", "txt", "--answer-from", "json:exif.by"], ["me", "me", "me"]),
    ],
)
def test_image_text_tars_are_trained(tmp_path, places, expected, capsys):
    tar(tmp_path / "00000.tar", {k: v for n in range(3) for k, v in image_text(n).items()}, tarfile.GNU_FORMAT)
    assert index(tmp_path) == 2 and "--caption-from txt" in capsys.readouterr().err
    assert index(tmp_path, *places) == 0
    assert answers(tmp_path) == expected and check(tmp_path) == []


def test_the_choice_of_texts_is_part_of_the_data(tmp_path):
    """A run that resumes must not continue with other texts."""
    tar(tmp_path / "00000.tar", image_text(0))
    prints = set()
    for places in (["--caption-from", "txt"], ["--caption-from", "json:caption"], ["--caption-from", "json:url"]):
        assert index(tmp_path, *places) == 0
        prints.add(ShardDataset(tmp_path).fingerprint)
    assert len(prints) == 3


def test_records_without_their_text_are_left_out(tmp_path, capsys):
    members = {k: v for n in range(6) for k, v in image_text(n).items()}
    del members["000000001.txt"]
    members["000000002.txt"] = b" \n"
    members["000000003.txt"] = b"\xff\xfe"
    del members["000000004.jpg"]
    tar(tmp_path / "x.tar", members)
    assert index(tmp_path, "--caption-from", "txt") == 0
    shown = capsys.readouterr().out
    for words in (
        "1: has no .txt member",
        "2: its text at txt is empty",
        "3: .txt is not UTF-8",
        "4: has no image or video",
    ):
        assert f"x.tar:00000000{words}" in shown
    assert answers(tmp_path) == ["caption 0", "caption 5"]
    content = bytearray((tmp_path / "x.tar").read_bytes())
    content[content.index(b"caption 5")] ^= 1
    (tmp_path / "x.tar").write_bytes(content)
    data = ShardDataset(tmp_path)
    with pytest.raises(BadRecord, match="x.tar:000000005: bytes"):
        data.read(1)
    assert [p.key for p in repair(tmp_path)] == ["000000005"] and answers(tmp_path) == ["caption 0"]


def test_films_styles_and_chosen_media(tmp_path):
    film, one = (demo.MEDIA / "bunny.mp4").read_bytes(), picture(30)
    tar(tmp_path / "x.tar", {"a.mp4": film, "a.txt": b"a rabbit", "a.png": one})
    assert index(tmp_path, "--caption-from", "txt") == 2
    assert (
        index(tmp_path, "--caption-from", "txt", "--media-from", "mp4", "--caption-style", "video_short_caption") == 0
    )
    label, members = ShardDataset(tmp_path).read(0)
    record = parse_record(label, members)
    assert record.video == film and json.loads(members["json"])["annotations"][0]["style"] == "video_short_caption"
    texts = ForeignTexts(caption="txt")
    many = {f"{n}.png": one for n in (10, 9, 1)} | {"txt": b"x"}
    assert json.loads(texts.members("s:k", many)["json"])["images"] == ["1.png", "9.png", "10.png"]
    chosen = ForeignTexts(caption="txt", media=(".10.PNG", "1.png"))
    assert json.loads(chosen.members("s:k", many)["json"])["images"] == ["10.png", "1.png"]
    assert ForeignTexts(**chosen.head()) == chosen
    with pytest.raises(BadRecord, match="has no .2.png member"):
        ForeignTexts(caption="txt", media=("2.png",)).members("s:k", many)
    with pytest.raises(UserError, match="nothing to train on"):
        ForeignTexts()
