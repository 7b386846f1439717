"""molmo2 shards: what training would take but nobody can have meant is named by check and index, and kept by repair."""

import json

import pytest

from data_prep.shard_repair import repair
from data_prep.shard_tools import check, index
from molmo2_nemo.data.manifest import MANIFEST
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tar_manifest import write_manifest

QA = {"style": "user_qa", "question": "q", "answer": "a"}
RECORDS = {
    "good": QA,
    "field": {**QA, "anwser": "b"},
    "style": {**QA, "style": "mood"},
    "twice": {"style": "a_okvqa_mc", "question": "q", "options": ["a", "a"], "answer_idx": 0},
    "empty": {**QA, "answer": " "},
}


@pytest.fixture
def old(tmp_path):
    """Shards as they were written before their names were checked."""
    made = {key: {"json": json.dumps({"annotations": [fields]}).encode()} for key, fields in RECORDS.items()}
    write_shards(tmp_path / "old", made.items())
    return tmp_path / "old"


def named(problems):
    return {problem.key: problem.text for problem in problems}


def test_check_names_them_and_training_keeps_reading_them(old):
    found = named(check(old))
    assert set(found) == set(RECORDS) - {"good"}
    assert (
        "did you mean 'answer'?" in found["field"]
        and "own:mood" in found["style"]
        and "answer must be a text" in found["empty"]
    )
    data = ShardDataset(old)
    assert len([parse_record(*data.read(i)) for i in range(len(data))]) == len(RECORDS)


def test_repair_takes_out_only_what_training_refuses(old):
    (tar,) = old.glob("*.tar")
    content = bytearray(tar.read_bytes())
    content[content.index(b'"q", "answer": " "') + 1] ^= 2  # so that there is something to repair
    tar.write_bytes(content)
    assert set(named(repair(old))) == {"empty"}
    assert set(named(check(old))) == set(RECORDS) - {"good", "empty"}


def test_published_sets_are_asked_for_known_fields_only(old):
    write_manifest(old, "old", head={"kind": "image, question and answer"})
    assert set(named(check(old))) == {"field", "empty"}
    head = index(old)
    assert head["kind"] == "image, question and answer" and head["records"] == len(RECORDS) - 2


def test_index_leaves_them_out_by_name(old):
    (old / MANIFEST).unlink()
    assert index(old)["records"] == 1
    lines = [json.loads(line) for line in (old / "skipped.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == set(RECORDS) - {"good"}
    assert named(check(old)) == {}
