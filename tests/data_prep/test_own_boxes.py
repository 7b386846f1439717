"""Boxes in tables. Oracle: the points at their centres, written by hand in this project's own fields."""

import csv
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import demo
from data_prep.sources.own_boxes import BOXES, CUT, ONE_BOX
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.shards import ShardDataset

# Two eyes and a nose on a picture of 100 x 100: their centres.
POINTS = {"eye": [[20.0, 30.0], [60.0, 30.0]], "nose": [[40.0, 55.0]]}
CENTRES = [[20, 30], [40, 55], [60, 30]]
LABELS = ["eye", "nose", "eye"]
SIZE = {"width": 100, "height": 100}


def boxes(form, width=10, height=4):
    made = []
    for x, y in CENTRES:
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        made.append(
            {
                "xywh": [left, top, width, height],
                "xyxy": [left, top, right, bottom],
                "cxcywh": [x, y, width, height],
                "named": {"xmin": left, "ymin": top, "xmax": right, "ymax": bottom},
                "sizes": {"x": left, "y": top, "width": width, "height": height},
            }[form]
        )
    return made


def prepare(*words):
    return main(["prepare", *map(str, words), "--workers", "0"])


def annotations(folder):
    data = ShardDataset(folder)
    return [json.loads(data.read(i)[1]["json"])["annotations"] for i in range(len(data))]


def notes(folder):
    return {text: count for text, (count, *_) in read_head(folder / MANIFEST)["notes"].items()}


def said(points=POINTS):
    return [{"style": "pointing", "label": label, "points": one, **SIZE} for label, one in points.items()]


@pytest.fixture
def place(tmp_path):
    shutil.copy(demo.MEDIA / "cat.jpg", tmp_path)
    return tmp_path


def table(path, **cells):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", *cells, *SIZE])
        writer.writeheader()
        texts = {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in cells.items()}
        writer.writerow({"image": "cat.jpg", **texts, **SIZE})


@pytest.mark.parametrize("form", ["xywh", "xyxy", "cxcywh", "named", "sizes"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_centres_by_label(form, kind, place):
    told = form in ("xywh", "xyxy", "cxcywh")
    path = place / f"t.{kind}"
    if kind == "csv":
        table(path, bbox=boxes(form), category=LABELS)
    else:
        pq.write_table(
            pa.Table.from_pylist([{"image": "cat.jpg", "bbox": boxes(form), "category": LABELS, **SIZE}]), path
        )
    (place / "map.yaml").write_text(f"box_format: {form}\n")
    assert prepare(path, "--out", place / "out", "--strict", *(["--map", place / "map.yaml"] if told else [])) == 0
    assert annotations(place / "out" / "t") == [said()]
    assert notes(place / "out" / "t")[BOXES] == 1


def test_four_numbers_say_nothing_by_themselves(place, capsys):
    table(place / "t.csv", bbox=boxes("xywh"), category=LABELS)
    assert prepare(place / "t.csv", "--out", place / "out") == 2
    error = capsys.readouterr().err
    assert "box_format: xywh (left, top, width, height)" in error and "box_format: xyxy" in error and "--map" in error


def test_a_single_box_is_counted(place):
    table(place / "t.csv", box="15, 28, 25, 32", label="eye")
    (place / "map.yaml").write_text("box_format: xyxy\n")
    assert prepare(place / "t.csv", "--out", place / "out", "--strict", "--map", place / "map.yaml") == 0
    assert annotations(place / "out" / "t") == [said({"eye": [[20.0, 30.0]]})]
    assert notes(place / "out" / "t")[ONE_BOX] == 1


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"bbox": boxes("named"), "label": ["eye"]}, "1 labels for 3 boxes"),
        ({"bbox": boxes("named"), "label": [1, 2, 1]}, "a text for each box (numbers of classes have no words)"),
        ({"bbox": [{"xmin": 5, "ymin": 5, "xmax": 1, "ymax": 9}], "label": "eye"}, "positive width and height"),
        ({"bbox": [{"left": 5}], "label": "eye"}, "four numbers, or an object"),
        ({"bbox": "everywhere", "label": "eye"}, "a list of boxes"),
        ({"bbox": boxes("named")}, "a text for each box"),
    ],
)
def test_what_is_no_box(cells, says, place, capsys):
    table(place / "t.csv", **cells)
    assert prepare(place / "t.csv", "--out", place / "out") == 2
    assert says in capsys.readouterr().err


# A picture of 100 x 100; boxes as left, top, right, bottom, and the points that they become, by hand.
REACHING = {
    "inside": ([10, 20, 30, 40], [20, 30], False),
    "one percent outside": ([-1, 20, 31, 101], [15, 60.5], False),
    "left and bottom": ([-20, 60, 40, 140], [20, 80], True),
    "its centre is outside": ([90, 0, 130, 40], [95, 20], True),
}


@pytest.mark.parametrize("unit", ["size", "share", "pixels"])
@pytest.mark.parametrize("case", REACHING)
def test_what_reaches_out_of_the_picture_is_cut_off(unit, case, place):
    Image.new("RGB", (100, 100)).save(place / "cat.jpg")
    box, point, cut = REACHING[case]
    part = 100 if unit == "share" else 1
    fields = {"size": SIZE, "share": {"point_scale": 1}, "pixels": {}}[unit]
    row = {"image": "cat.jpg", "bbox": [[value / part for value in box]], "label": "eye", **fields}
    pq.write_table(pa.Table.from_pylist([row]), place / "t.parquet")
    (place / "map.yaml").write_text("box_format: xyxy\n")
    assert prepare(place / "t.parquet", "--out", place / "out", "--strict", "--map", place / "map.yaml") == 0
    ((made,),) = annotations(place / "out" / "t")
    assert made["points"] == [pytest.approx([value / part for value in point])]
    assert notes(place / "out" / "t").get(CUT, 0) == cut


def test_a_box_outside_its_picture_is_refused_by_name(place, capsys):
    table(place / "t.csv", bbox=[{"x1": 120, "y1": 5, "x2": 160, "y2": 20}], label="eye")
    assert prepare(place / "t.csv", "--out", place / "out") == 2
    assert "boxes[0]" not in (error := capsys.readouterr().err) and "bbox[0]" in error
    assert "a box inside the picture, 100 x 100" in error


def test_a_coco_box_is_cut_to_the_size_that_the_file_gives(place):
    """The picture itself has 480 x 360 pixels or so: the file's own size is what boxes are measured in."""
    coco = {
        "images": [{"id": 1, "file_name": "cat.jpg", "width": 100, "height": 50}],
        "categories": [{"id": 1, "name": "eye"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [60, 10, 80, 20]}],
    }
    (place / "c.json").write_text(json.dumps(coco))
    assert prepare(place / "c.json", "--out", place / "out", "--strict") == 0
    ((made,),) = annotations(place / "out" / "c")
    assert made["points"] == [[80.0, 20.0]] and notes(place / "out" / "c")[CUT] == 1


NONE = [{"style": "pointing", "label": "dog", "points": []}]
ONE = [{"style": "pointing", "label": "eye", "points": [[20.0, 30.0]]}]
SAYS_OF_WHAT = "boxes, or a label beside it that says what there is none of"
WITH_MAP = {  # a line, what becomes of it: annotations, or (field, part of what was expected)
    "in the other column": ({"label": "eye", "bbox": [[10, 20, 20, 20]]}, ONE),
    "none of a label": ({"label": "dog", "bbox": []}, NONE),
    "none, said by the first column": ({"label": "dog", "boxes": []}, NONE),
    "none of nothing": ({"bbox": []}, ("bbox", SAYS_OF_WHAT)),
    "no labels for no boxes": ({"label": [], "boxes": []}, ("boxes", SAYS_OF_WHAT)),
    "the same twice": ({"label": "eye", "boxes": [[10, 20, 20, 20]], "bbox": [[10, 20, 20, 20]]}, ONE),
    "different ones": ({"label": "eye", "boxes": [[1, 2, 3, 4]], "bbox": [[10, 20, 20, 20]]}, ("boxes", "what bbox h")),
    "none and some": ({"label": "eye", "boxes": [], "bbox": [[10, 20, 20, 20]]}, ("boxes", "what bbox holds, [[10")),
    "a label alone": ({"label": "eye"}, ("caption", "a value there (or in boxes, bbox)")),
    "a label beside a caption": ({"label": "eye", "caption": "A."}, [{"style": "long_caption", "text": "A."}]),
}
WITHOUT = {
    "none of a label": WITH_MAP["none of a label"],
    "none of nothing": WITH_MAP["none of nothing"],
    "beside a caption": ({"caption": "A.", "boxes": []}, [{"style": "long_caption", "text": "A."}]),
    "some": ({"label": "eye", "bbox": [[10, 20, 20, 20]]}, ("bbox", "a field that --map names: boxes: FIELD")),
}
LINES = [("map", name, *line) for name, line in WITH_MAP.items()] + [("", n, *line) for n, line in WITHOUT.items()]


@pytest.mark.parametrize(("mapped", "name", "line", "made"), LINES, ids=[f"{m}-{n}" for m, n, *_ in LINES])
def test_boxes_in_lines(mapped, name, line, made, place):
    """What each line becomes beside one that has both names of boxes and a caption."""
    first = {"caption": "A cat.", "label": "cat", "boxes": [], "bbox": []} if mapped else {"caption": "A cat."}
    lines = [{"image": "cat.jpg", **one} for one in (first, line)]
    (place / "t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (place / "map.yaml").write_text("box_format: xywh\n")
    words = ["--map", place / "map.yaml"] if mapped else []
    assert prepare(place / "t.jsonl", "--out", place / "out", *words) == 0
    found = annotations(place / "out" / "t")[1:]
    listed = place / "out" / "t" / "skipped.jsonl"
    if isinstance(made, list):
        assert found == [made] and not listed.exists()
        return
    (said,) = map(json.loads, listed.read_text().splitlines())
    assert found == [] and said["line"] == 2 and said["field"] == made[0] and said["expected"].startswith(made[1])


def test_objects_of_hugging_face_have_their_names(place):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["nose", "eye"])
    listed = getattr(datasets, "List", datasets.Sequence)
    objects = {"bbox": listed(listed(datasets.Value("float32"))), "category": listed(names)}
    features = datasets.Features(
        image=datasets.Value("string"), objects=objects, width=datasets.Value("int64"), height=datasets.Value("int64")
    )
    row = {"image": "cat.jpg", "objects": {"bbox": boxes("xywh"), "category": [1, 0, 1]}, **SIZE}
    datasets.Dataset.from_list([row], features=features).to_parquet(str(place / "t.parquet"))
    (place / "map.yaml").write_text("boxes: objects.bbox\nlabel: objects.category\nbox_format: xywh\n")
    assert prepare(place / "t.parquet", "--out", place / "out", "--strict", "--map", place / "map.yaml") == 0
    assert annotations(place / "out" / "t") == [said()]


def test_boxes_beside_another_task_without_labels_are_not_read(place, capsys):
    table(place / "t.csv", caption="A cat.", bbox=boxes("xywh"))
    assert prepare(place / "t.csv", "--out", place / "out", "--strict") == 0
    assert annotations(place / "out" / "t") == [[{"style": "long_caption", "text": "A cat."}]]
    assert any(line.split() == ["bbox", "not", "read"] for line in capsys.readouterr().out.splitlines())
