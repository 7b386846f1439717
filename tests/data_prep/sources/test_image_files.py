"""Image sources from real files: parquet and JSON in the published layouts and pictures below --source -> shards."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.prepare import Options, prepare
from data_prep.sources import find_source
from data_prep.sources.base import SourceError
from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.record import Record, parse_record
from molmo2_nemo.data.shards import ShardDataset
from tests.support.source_rows import png

URLS = [f"https://example.org/{i}.jpg" for i in range(3)]


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write(path: Path, content: bytes | str | dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )


def shards(name: str, folder: Path, tmp_path: Path) -> list[Record]:
    """The records that `molmo2 prepare NAME --source FOLDER` writes."""
    out = tmp_path / "out" / name
    prepare(find_source(name), out, Options(folders=(folder,), cache=tmp_path / "cache"))
    dataset = ShardDataset(out, name)
    return [parse_record(*dataset.read(i)) for i in range(len(dataset))]


def test_points_from_a_copy_of_the_hub(tmp_path):
    """The copy of PixMo-Points is not mistaken for that of the evaluation set, whose images are left out."""
    rows = [
        {
            "image_url": url,
            "image_sha256": "00",
            "points": [{"x": 25.0, "y": 50.0}],
            "count": 1,
            "label": "Dog",
            "collection_method": "pointing",
        }
        for url in URLS
    ]
    source = tmp_path / "source"
    parquet(source / "pixmo-points" / "data" / "train-00000-of-00001.parquet", rows)
    parquet(source / "pixmo-points-eval" / "data" / "test-00000-of-00001.parquet", [{"image_url": URLS[2]}])
    for url in URLS:
        write(source / "pixmo_images" / hashlib.sha256(url.encode()).hexdigest(), png())
    records = shards("pixmo_points_train", source, tmp_path)
    assert [record.images for record in records] == [[png()], [png()]]
    assert [tree[0].content.style.name for tree in records[0].variants] == ["point_count", "pointing"]
    names = [hashlib.sha256(url.encode()).hexdigest() for url in URLS[:2]]
    several = {
        "images": [f"pixmo_images/{name}" for name in names],
        "labels": ["Dog", "dogs"],
        "normalized_labels": ["dog", "dog"],
        "points": [[{"x": 1.0, "y": 2.0}], []],
        "counts": [1, 0],
    }
    parquet(source / "Molmo2-MultiImagePoint" / "train.parquet", [several])  # the name that it is published under, too
    (record,) = shards("pixmo_multi_points", source, tmp_path)
    assert len(record.images) == 2 and record.variants[0][0].content.points == (((1.0, 2.0),), ())


def test_message_lists_with_pictures_below_the_source(tmp_path):
    """JSON that came with the pictures does not make the folder a copy of the repository."""
    source = tmp_path / "source"
    path = "images/coco/train2014/COCO_train2014_000000000009.jpg"
    message = {"question": "What is it?", "answers": ["cake", "cake", "bread"], "style": "vqa2", "question_id": 1}
    parquet(
        source / "molmo2-vqa2-2014" / "train" / "train-00000-of-00001.parquet",
        [{"image": path, "message_list": [message], "metadata/image_id": 9}],
    )
    write(source / "images" / "coco" / "annotations" / "instances_train2014.json", {"images": []})
    write(source / path, png())
    (record,) = shards("coco_2014_vqa_multi", source, tmp_path)
    assert record.images == [png()] and record.annotations[0].content.answer.texts == ("cake", "cake", "bread")


def test_pictures_inside_parquet(tmp_path):
    source = tmp_path / "source"
    image = {"bytes": png(), "path": None}
    pairs = {"question": ["How high?"], "explanation": ["It says 5."], "answer": ["5"]}
    parquet(source / "chart" / "train-00000-of-00001.parquet", [{"id": "c1", "image": image, "qa_pairs": pairs}])
    (record,) = shards("cosyn_chart_exp", source, tmp_path)
    assert record.images == [png()] and record.annotations[0].content.answer.explanation == "It says 5."
    both = [{"image": image, "query": "?", "label": [str(i)], "human_or_machine": i} for i in range(2)]
    parquet(tmp_path / "charts" / "data" / "train-00000-of-00001.parquet", both)
    human, machine = shards("chart_qa_weighted", tmp_path / "charts", tmp_path)
    assert human.weight_factor == pytest.approx(1.4772, abs=1e-4) and machine.weight_factor < 1


def test_documents_fetched_by_hand(tmp_path):
    source = tmp_path / "source"
    with pytest.raises(SourceError, match=r"train_v1.0_withQT.json not found.*rrc.cvc.uab.es.*documents/NAME.png"):
        shards("doc_qa", source, tmp_path)
    row = {"questionId": 7, "question": "date?", "image": "documents/a_1.png", "docId": 3, "answers": ["1993"]}
    write(source / "train_v1.0_withQT.json", {"dataset_name": "x", "data": [{**row, "data_split": "train"}]})
    write(source / "documents" / "a_1.png", png())
    (record,) = shards("doc_qa", source, tmp_path)
    assert record.images == [png()] and record.annotations[0].content.style.name == "doc_qa"


def test_tables_and_figures(tmp_path):
    write(tmp_path / "t" / "tables" / "9.png", png())
    write(tmp_path / "t" / "problems_train.json", {"9": {"question": "Sum?", "answer": "4", "split": "train"}})
    (record,) = shards("tabwmp_da", tmp_path / "t", tmp_path)
    expected = {"style": "tabwmp_da", "question": "Sum?", "answer": "4"}
    assert record.annotations == [read_annotation(expected, num_images=1, has_video=False)]
    asked = [{"image_index": 3, "question_string": f"Q{i}", "answer": i, "question_id": i} for i in (0, 1)]
    write(tmp_path / "f" / "png" / "3.png", png())
    write(tmp_path / "f" / "qa_pairs.json", {"qa_pairs": asked})
    (record,) = shards("figure_qa", tmp_path / "f", tmp_path)
    assert [annotation.content.answer.texts for annotation in record.annotations] == [("0",), ("1",)]


def test_diagrams_with_letters(tmp_path):
    source = tmp_path / "source"
    question = {
        "abcLabel": True,
        "answerTexts": ["A", "B", "C"],
        "correctAnswer": 1,
        "questionId": "5.png-0",
    }
    plain = {**question, "abcLabel": False, "answerTexts": ["root", "leaf", "{}"], "questionId": "5.png-1"}
    write(
        source / "questions" / "5.png.json",
        {"imageName": "5.png", "questions": {"Which is the leaf?": question, "What is green?": plain}},
    )
    text = {"T0": {"rectangle": [[10, 10], [30, 30]], "replacementText": "B", "value": "leaf"}}
    write(source / "annotations" / "5.png.json", {"text": text, "arrows": {}})
    write(source / "images" / "5.png", png())
    write(source / "ai2d_test_ids.csv", "11\n12\n")
    opaque, beside, other = shards("ai2_diagram_v2_mix_transparent", source, tmp_path)
    assert other.images == [png()] and len({opaque.images[0], beside.images[0], png()}) == 3
    assert opaque.annotations == beside.annotations and other.annotations[0].content.options == ("root", "leaf")
