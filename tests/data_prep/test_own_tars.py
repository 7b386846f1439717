"""Tars of other tools. Oracle: the same records as JSON Lines in this project's own fields; webdataset's own writer."""

import io
import json
import shutil
import tarfile

import pytest
import webdataset

from data_prep import demo
from data_prep.own_files import find_rows
from data_prep.sources.base import Stored
from data_prep.sources.own import SAME_ID
from data_prep.sources.own_shapes import not_read
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.media_once import FIELD
from molmo2_nemo.data.shards import ShardDataset

CAT, HORSE = ((demo.MEDIA / name).read_bytes() for name in ("cat.jpg", "horse.jpg"))
BUNNY = (demo.MEDIA / "bunny.mp4").read_bytes()


def tar(path, *records):
    """Records as webdataset's own writer writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as out:
        for number, record in enumerate(records):
            out.write({"__key__": f"{number:09d}", **record})


def prepare(*words):
    return main(["prepare", *map(str, words), "--workers", "0"])


def records(folder):
    data = ShardDataset(folder)
    read = [data.read(i)[1] for i in range(len(data))]
    return [{**members, "json": {**json.loads(members["json"]), FIELD: None}} for members in read]


def oracle(tmp_path, *lines):
    """The records that JSON Lines become; media of the demo."""
    for name in ("cat.jpg", "horse.jpg", "bunny.mp4"):
        shutil.copy(demo.MEDIA / name, tmp_path)
    (tmp_path / "oracle.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prepare(tmp_path / "oracle.jsonl", "--out", tmp_path / "oracle", "--strict") == 0
    return records(tmp_path / "oracle" / "oracle")


def skipped(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def notes(folder):
    return {text: count for text, (count, *_) in read_head(folder / MANIFEST)["notes"].items()}


def of_download(key, caption):
    """The JSON that img2dataset writes beside a picture."""
    said = {"caption": caption, "url": f"https://x/{key}", "key": key, "status": "success", "error_message": None}
    return said | {
        "width": 384,
        "height": 384,
        "original_width": 900,
        "exif": "{}",
        "sha256": "0",
        "punsafe": float("nan"),
    }


def test_img2dataset(tmp_path, capsys):
    folder = tmp_path / "laion"
    for shard, texts in enumerate((("A cat.", "A horse."), ("A second cat.", None))):
        made = [
            {"jpg": media, "txt": text, "json": of_download(f"{shard:05d}{i:04d}", text)}
            for i, (media, text) in enumerate(zip((CAT, HORSE), texts, strict=True))
            if text is not None
        ]
        tar(folder / f"{shard:05d}.tar", *made)
        (folder / f"{shard:05d}.parquet").write_bytes(b"of downloads")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    assert prepare(folder, "--out", tmp_path / "out", "--strict") == 0
    said = capsys.readouterr().out
    assert f"{folder}: img2dataset, 2 tars; its columns are taken for" in said
    words = [" ".join(line.split()) for line in said.splitlines()]
    assert "jpg image" in words and "txt caption" in words and "url not read" in words
    assert "not read: 00000.parquet and 3 more files beside the tars" in words
    lines = [
        {"image": "cat.jpg", "caption": "A cat."},
        {"image": "horse.jpg", "caption": "A horse."},
        {"image": "cat.jpg", "caption": "A second cat."},
    ]
    assert records(tmp_path / "out" / "laion") == oracle(tmp_path, *lines)
    found = notes(tmp_path / "out" / "laion")
    assert not_read("url") not in found and found[SAME_ID] == 1  # webdataset's key 000000000 of both tars


def test_media_are_read_by_their_place_and_nothing_is_unpacked(tmp_path):
    tar(tmp_path / "a.tar", {"jpg": CAT, "txt": "A cat."}, {"jpg": HORSE, "txt": "A horse."})
    rows = list(find_rows(tmp_path / "a.tar").rows())
    for row, media in zip(rows, (CAT, HORSE), strict=True):
        stored = row["entry"]["jpg"]
        assert isinstance(stored, Stored) and stored.read() == media
        with tarfile.open(tmp_path / "a.tar") as members:
            assert members.getmember(stored.name).offset_data == stored.offset
    assert prepare(tmp_path / "a.tar", "--out", tmp_path / "out") == 0
    assert not {path for path in (tmp_path / "out").rglob("*") if path.suffix in (".jpg", ".txt")}


def energon(folder, dataset, *, exclude=()):
    import yaml

    (folder / ".nv-meta").mkdir(parents=True)
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(dataset))
    parts = {"train": ["shards/shard_{000..001}.tar"], "val": ["shards/shard_002.tar"]}
    (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump({"exclude": list(exclude), "split_parts": parts}))
    (folder / ".nv-meta" / ".info.yaml").write_text("shard_counts: {}")


def of_type(name, **fields):
    kind = {"__module__": "megatron.energon", "__class__": name}
    return {"sample_type": kind, "field_map": fields} if fields else {"sample_type": kind}


QA = {"q": {"text": "Which animal?"}, "a": ["a cat", "cat"], "choices": ["a dog", "a cat"], "right": 1, "url": "x"}
CHOICE = {"style": "a_okvqa_mc", "question": "Which animal?", "options": ["a dog", "a cat"], "answer_idx": 1}
ENERGON = {
    "caption": (of_type("CaptioningSample", image="jpg", caption="txt"), {"caption": "A cat."}),
    "vqa": (
        of_type("VQASample", image="jpg", context="json[q][text]", answers="json[a]"),
        {"question": "Which animal?", "answer": ["a cat", "cat"]},
    ),
    "alternatives": (of_type("CaptioningSample", image="png,jpg", caption="json[none],txt"), {"caption": "A cat."}),
    "one answer": (
        of_type("VQASample", image="jpg", context="json[q][text]", answers="json[a][1]"),
        {"question": "Which animal?", "answer": "cat"},
    ),
    "choice": (
        of_type(
            "MultiChoiceVQASample",
            image="jpg",
            context="json[q][text]",
            choices="json[choices]",
            correct_choice_idx="json[right]",
        ),
        {
            "annotations": [
                {"style": "a_okvqa_mc", "question": "Which animal?", "options": ["a dog", "a cat"], "answer_idx": 1}
            ]
        },
    ),
}


@pytest.mark.parametrize("name", ENERGON)
def test_energon(name, tmp_path, capsys):
    dataset, fields = ENERGON[name]
    folder = tmp_path / "set"
    for number in range(3):
        tar(folder / "shards" / f"shard_{number:03d}.tar", *[{"jpg": CAT, "txt": "A cat.", "json": QA}] * 2)
    energon(folder, dataset, exclude=["shards/shard_001.tar/000000000"])
    assert prepare(folder, "--out", tmp_path / "out", "--strict") == 0
    said = capsys.readouterr().out
    assert "Megatron-Energon, 2 tars" in said and "not read: the split val" in said and "split.yaml excludes" in said
    assert records(tmp_path / "out" / "set") == oracle(tmp_path, *[{"image": "cat.jpg", **fields}] * 3)


def test_energon_samples_that_code_makes(tmp_path, capsys):
    folder = tmp_path / "set"
    for number in range(3):
        tar(folder / "shards" / f"shard_{number:03d}.tar", {"jpg": CAT, "detail.json": {"words": ["A cat."]}})
    (folder / "shards" / "evil.py").write_text("raise SystemExit")
    energon(folder, of_type("CaptioningSample") | {"sample_loader": "evil.py:sample_loader"})
    assert prepare(folder, "--out", tmp_path / "out") == 2
    assert "evil.py:sample_loader, and code of a data set is not run" in capsys.readouterr().err
    (tmp_path / "map.yaml").write_text("caption: detail.json[words][0]\n")
    assert prepare(folder, "--out", tmp_path / "out", "--map", tmp_path / "map.yaml", "--strict") == 0
    assert records(tmp_path / "out" / "set") == oracle(tmp_path, *[{"image": "cat.jpg", "caption": "A cat."}] * 2)


def test_a_crude_energon_set_is_taken_by_its_names(tmp_path):
    folder = tmp_path / "set"
    for number in range(3):
        tar(
            folder / "shards" / f"shard_{number:03d}.tar",
            {"mp4": BUNNY, "json": {"question": "Who?", "answer": "a rabbit"}},
        )
    energon(folder, {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"})
    assert prepare(folder, "--out", tmp_path / "out", "--strict") == 0
    line = {"video": "bunny.mp4", "question": "Who?", "answer": "a rabbit"}
    assert records(tmp_path / "out" / "set") == oracle(tmp_path, line, line)


CHAT = [{"from": "human", "value": "<image>\nWhich animal?"}, {"from": "gpt", "value": "a cat"}]
TOLD = {"image": "cat.jpg", "messages": ["Which animal?", "a cat"]}
QUESTION = {"question": "Who?", "answer": "It."}
GENERIC = {
    "chat beside a path": ({"jpg": CAT, "json": {"id": "7", "image": "coco/1.jpg", "conversations": CHAT}}, TOLD),
    "a bare chat": ({"jpg": CAT, "json": CHAT}, TOLD),
    "numbered": (
        {"1.jpg": HORSE, "0.jpg": CAT, "txt": "Two animals."},
        {"images": ["cat.jpg", "horse.jpg"], "caption": "Two animals."},
    ),
    "energon's numbers": (
        {"img10.jpg": HORSE, "img2.jpg": CAT, "txt": "Two animals."},
        {"images": ["cat.jpg", "horse.jpg"], "caption": "Two animals."},
    ),
    "members named by the JSON": (
        {
            "0.jpg": CAT,
            "json": {"images": ["0.jpg"], "annotations": [{"style": "user_qa", "question": "Who?", "answer": "It."}]},
        },
        {"image": "cat.jpg", **QUESTION},
    ),
}


@pytest.mark.parametrize("name", GENERIC)
def test_webdatasets(name, tmp_path):
    record, line = GENERIC[name]
    tar(tmp_path / "set" / "0.tar", record)
    assert prepare(tmp_path / "set", "--out", tmp_path / "out", "--strict") == 0
    assert records(tmp_path / "out" / "set") == oracle(tmp_path, line)


def test_one_kind_of_picture_may_have_several_endings(tmp_path):
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(CAT)).save(file, "PNG")
    tar(
        tmp_path / "a.tar",
        {"jpg": CAT, "txt": "A cat."},
        {"png": file.getvalue(), "txt": "A cat."},
        {"txt": "Nothing."},
    )
    assert prepare(tmp_path / "a.tar", "--out", tmp_path / "out") == 0
    assert [set(record) for record in records(tmp_path / "out" / "a")] == [{"0.jpg", "json"}, {"0.png", "json"}]
    (line,) = skipped(tmp_path / "out" / "a")
    assert (line["file"], line["line"], line["field"]) == ("a.tar", 3, "jpg")
    assert "only .txt in 000000002" in line["seen"]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"jpg": CAT, "cls": 3}, "the numbers of classes: Molmo2 learns from words"),
        ({"jpg": CAT, "png": CAT, "txt": "A cat."}, "several media (.jpg, .png); say which is meant"),
        ({"jpg": CAT, "mp4": BUNNY, "txt": "A cat."}, "such as video: mp4"),
        ({"jpg": CAT, "json": {"wording": "A cat."}}, "none of the columns (jpg, json, wording, __key__) is known"),
    ],
)
def test_what_is_not_clear_is_refused(record, says, tmp_path, capsys):
    tar(tmp_path / "a.tar", record)
    assert prepare(tmp_path / "a.tar", "--out", tmp_path / "out") == 2
    assert says in capsys.readouterr().err


def test_a_tar_that_is_cut_off_is_refused_with_a_way_to_go_on(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        tar(tmp_path / "set" / f"{name}.tar", {"jpg": CAT, "txt": "A cat."})
    cut = tmp_path / "set" / "b.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    assert prepare(tmp_path / "set", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "b.tar is cut off" in said and "To go on without this tar, move it to another folder" in said
    cut.rename(tmp_path / "b.tar")
    assert prepare(tmp_path / "set", "--out", tmp_path / "out") == 0
    assert len(records(tmp_path / "out" / "set")) == 1


def test_a_caption_is_taken_from_where_a_record_has_it(tmp_path, capsys):
    tar(
        tmp_path / "a.tar",
        {"jpg": CAT, "json": {"caption": "A cat."}},
        {"jpg": HORSE, "txt": "A horse."},
        {"jpg": CAT, "json": {"caption": None}, "txt": "A second cat."},
        {"jpg": CAT, "json": {"caption": "A cat."}, "txt": "A text beside it."},
        {"jpg": CAT, "json": {"by": "Ann"}},
    )
    assert prepare(tmp_path / "a.tar", "--out", tmp_path / "out") == 0
    texts = ("cat.jpg", "A cat."), ("horse.jpg", "A horse."), ("cat.jpg", "A second cat."), ("cat.jpg", "A cat.")
    assert records(tmp_path / "out" / "a") == oracle(tmp_path, *({"image": i, "caption": c} for i, c in texts))
    found = notes(tmp_path / "out" / "a")
    assert found["a row without 'caption': caption from 'txt'"] == 2 and found[not_read("txt")] == 1
    (line,) = skipped(tmp_path / "out" / "a")
    assert (line["line"], line["field"], line["expected"]) == (5, "caption", "a value there (or in txt)")
    assert line["seen"].startswith("nothing (filled: ")
    words = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "txt caption, in rows without caption" in words


def test_a_map_says_it(tmp_path):
    tar(tmp_path / "a.tar", {"jpg": HORSE, "png": CAT, "json": {"wording": {"en": ["A cat."]}}})
    for way in ("json.wording.en.0", "json:wording.en.0", "json[wording][en][0]", "wording.en.0"):
        (tmp_path / "map.yaml").write_text(f"image: png\ncaption: {way}\n")
        words = ("--map", tmp_path / "map.yaml", "--strict", "--overwrite")
        assert prepare(tmp_path / "a.tar", "--out", tmp_path / "out", *words) == 0
        (record,) = records(tmp_path / "out" / "a")
        assert record["json"]["annotations"] == [{"style": "long_caption", "text": "A cat."}]
        assert len(record) == 2 and CAT in record.values()


def test_damage_is_named_by_tar_and_record(tmp_path):
    tar(tmp_path / "set" / "0.tar", {"jpg": CAT, "json": b'{"caption": "A cat."}'}, {"jpg": CAT, "json": b"{"})
    tar(
        tmp_path / "set" / "1.tar",
        {"jpg": CAT[:40], "json": {"caption": "A cat."}},
        {"jpg": CAT, "json": {"caption": "A."}},
    )
    assert prepare(tmp_path / "set", "--out", tmp_path / "out") == 0
    found = [(line["file"], line["line"]) for line in skipped(tmp_path / "out" / "set")]
    assert found == [("0.tar", 2), ("1.tar", 1)] and len(records(tmp_path / "out" / "set")) == 2


def test_compressed_tars_and_own_data_sets_are_refused(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.tar.gz").write_bytes(b"x")
    assert prepare(tmp_path / "set", "--out", tmp_path / "out") == 2
    assert "0.tar.gz is compressed" in capsys.readouterr().err
    tar(tmp_path / "a.tar", {"jpg": CAT, "txt": "A cat."})
    assert prepare(tmp_path / "a.tar", "--out", tmp_path / "out") == 0
    assert prepare(tmp_path / "out" / "a", "--out", tmp_path / "again") == 2
    assert "is a data set of molmo2 already" in capsys.readouterr().err


def test_what_is_held_out_does_not_depend_on_where_the_tars_lie(tmp_path):
    names = []
    for place in ("here", "there/below"):
        texts = [{"jpg": CAT, "txt": f"Cat {i}."} for i in range(40)]
        tar(tmp_path / place / "set" / "0.tar", *texts)
        out = tmp_path / place / "out"
        assert prepare(tmp_path / place / "set", "--out", out, "--hold-out", "30%") == 0
        sides = [
            {r["json"]["annotations"][0]["text"] for r in records(out / name)} for name in ("set", "set-validation")
        ]
        assert len(sides[0] | sides[1]) == 40 and not sides[0] & sides[1]
        names.append(sides)
    assert names[0] == names[1]
