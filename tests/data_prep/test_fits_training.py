"""What prepare says of random records near the length of a sequence, against what the builder of training makes of them
at many accesses, with the same tokenizer and limits."""

import json
import random

import numpy as np
import pytest

from data_prep.fits import PERHAPS, SOMETIMES, too_long
from data_prep.run_limits import check_fits
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.check import View, check_record
from molmo2_nemo.data.record import BadRecord, parse_record
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.settings.compose import compose
from tests.support.films import film
from tests.support.source_rows import png

SIZES = (1, 1, 3, 12, 40, 70, 110, 160, 240)
ACCESSES, MORE = 10, 400
FRAMES, FPS = 16, 4


@pytest.fixture(scope="module")
def setup():
    config = compose(["recipe=tiny", "stage=sft"]).data
    config.sources, config.groups = {}, {}
    members = {"0.png": png(90, 70), "1.png": png(40, 60), "mp4": film(FRAMES, fps=FPS, size=(32, 32))}
    return config, ExampleBuilder(config, Molmo2Tokenizer.load("tiny")), members


def words(rng):
    return "why is this so " * rng.choice(SIZES) + "now"


def turn(rng):
    kind = rng.randrange(4)
    if kind == 0:
        return {"question": words(rng), "options": [words(rng), "a dog"], "answer_idx": 1, "style": "user_qa"}
    if kind == 1:
        return {"question": words(rng), "answers": [words(rng), words(rng)], "style": "user_qa"}
    return {"question": words(rng), "answer": words(rng), "style": "user_qa"}


def annotation(rng):
    kind = rng.randrange(6)
    if kind == 0:
        return {"style": "long_caption", "text": words(rng)}
    if kind == 1:
        return {"style": "user_qa", "messages": [words(rng) for _ in range(rng.choice((2, 4)))]}
    if kind == 2:
        return {"style": "user_qa", "either": [{"question": words(rng), "answer": words(rng)} for _ in range(2)]}
    if kind == 3:
        return {"style": "user_qa", "turns": [{"question": words(rng), "answer": words(rng)} for _ in range(2)]}
    return turn(rng)


def made(rng):
    data = rng.choice(({}, {"images": ["0.png"]}, {"images": ["0.png", "1.png"]}, {"video": "mp4"}))
    data = dict(data)
    if "video" in data and rng.random() < 0.7:
        said = words(rng)
        data["subtitles"] = said if rng.random() < 0.5 else [{"start": 0.0, "end": 1.0, "text": said}] * 2
    trees = [[annotation(rng) for _ in range(rng.choice((1, 1, 2, 3)))] for _ in range(rng.choice((1, 1, 1, 2)))]
    return data | ({"annotations": trees[0]} if len(trees) == 1 else {"variants": trees})


def view_of(data):
    if "video" in data:
        return View(video_size=(32, 32), duration=FRAMES / FPS, fps=FPS)
    return View(image_sizes=tuple({"0.png": (90, 70), "1.png": (40, 60)}[name] for name in data.get("images", [])))


def access(builder, record, seed, limit):
    """What training counts at one access."""
    try:
        info = builder.plan(record, np.random.default_rng(seed), max_tokens=limit).info
    except BadRecord as error:
        assert error.cause == "too long", error
        return {"skipped"}
    kinds = ("branches_dropped", "tokens_cut", "subtitle_tokens_cut")
    return {kind for kind in kinds if info.get(kind)} or {"whole"}


def test_the_verdict_is_what_training_does(setup):
    config, builder, media = setup
    limit, rng = config.packing.sequence_length, random.Random(7)
    tally = dict.fromkeys(("refused", "sometimes", "cut", "whole"), 0)
    rare = []
    for number in range(160):
        data = made(rng)
        names = [*data.get("images", []), *([data["video"]] if "video" in data else [])]
        members = {name: media[name] for name in names} | {"json": json.dumps(data).encode()}
        record, view = parse_record(f"s:{number}", members), view_of(data)
        check_record(record, view, config)
        seen = set.union(*(access(builder, record, seed, limit) for seed in range(ACCESSES)))
        try:
            check_fits(record, view, config)
            found = too_long(record, view, config)
        except BadRecord as error:
            tally["refused"] += 1
            assert error.cause == "too long" and error.fault is not None and error.fault.seen
            assert seen == {"skipped"}, (number, data)
            continue
        said = {"skipped" if kind == SOMETIMES else kind for kind in found}
        assert PERHAPS not in found and set(found.values()) <= {""}
        seed = ACCESSES
        while (seen == {"skipped"} or said - seen) and seed < MORE:
            seen |= access(builder, record, seed, limit)
            seed += 1
        assert seen != {"skipped"} and seen - {"whole"} <= said, (number, data, seen, said)
        rare += [(number, said - seen)] if said - seen else []
        tally["sometimes" if "skipped" in said else "cut" if said else "whole"] += 1
    assert min(tally.values()) > 8, tally
    assert not rare, rare


@pytest.mark.parametrize("name", ["question", "messages", "options", "subtitles", "text of subtitles"])
def test_prepare_check_and_index_refuse_what_training_always_skips(tmp_path, capsys, name):
    (tmp_path / "cat.png").write_bytes(png(40, 30))
    (tmp_path / "a.mp4").write_bytes(film(8, fps=4, size=(32, 32)))
    long = "why is this so " * 150
    multiple = {"style": "user_qa", "question": "q", "options": [f"{i} {long}" for i in range(9)], "answer_idx": 0}
    line = {
        "question": {"image": "cat.png", "question": long, "answer": "a cat"},
        "messages": {"image": "cat.png", "messages": [long, "a cat"]},
        "options": {"image": "cat.png", "annotations": [multiple]},
        "subtitles": {
            "video": "a.mp4",
            "question": "q",
            "answer": "a",
            "subtitles": [{"start": 0, "end": 1, "text": long}] * 2,
        },
        "text of subtitles": {"video": "a.mp4", "question": "q", "answer": "a", "subtitles": long * 2},
    }[name]
    good = {"image": "cat.png", "question": "q", "answer": "a"}
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (good, line)))
    run = ["prepare", str(tmp_path / "my.jsonl"), "--workers", "0", "--out", str(tmp_path / "out")]
    tiny = ["--for", "recipe=tiny", "stage=sft"]
    assert main([*run, *tiny]) == 0
    (listed,) = map(json.loads, (tmp_path / "out" / "my" / "skipped.jsonl").read_text().splitlines())
    assert (listed["line"], listed["reason"]) == (2, "too long")
    assert "before the first answer" in listed["seen"] and "sequence_length" in listed["expected"]
    field = "subtitles" if "subtitles" in name else "annotations[0]"
    assert listed["field"].startswith(field) or listed["field"] in line, listed
    assert main([*run, "--overwrite"]) == 0  # the sequences of the defaults hold it
    out = str(tmp_path / "out" / "my")
    capsys.readouterr()
    assert main(["shards", "check", out, "--workers", "0", "--json", *tiny]) == 2
    found = [json.loads(one) for one in capsys.readouterr().out.splitlines()]
    assert [one["seen"] for one in found if one["reason"] == "problem"] == [listed["seen"]]
    assert main(["shards", "index", out, *tiny]) == 0
    indexed = json.loads((tmp_path / "out" / "my" / "skipped.jsonl").read_text().splitlines()[-1])
    assert indexed["seen"] == listed["seen"]


def test_an_estimate_refuses_only_what_no_tokenizer_fits(setup):
    config, builder, _ = setup
    unknown = compose(["recipe=tiny", "stage=sft", "data.tokenizer=nowhere"]).data

    def verdict(question):
        data = {"annotations": [{"style": "user_qa", "question": question, "answer": "a"}]}
        record = parse_record("s:k", {"json": json.dumps(data).encode()})
        try:
            return set(too_long(record, View(), unknown))
        except BadRecord as error:
            return str(error)

    assert "by the lowest estimate" in verdict("so " * 800)
    assert PERHAPS in verdict("extraordinarily " * 500)
    assert verdict("so") == set()
