"""Sets of several pictures: rows in their published schema -> samples."""

import hashlib

import pytest

from data_prep.sources.base import ArchiveMember, File, FirstOf, HubFile
from data_prep.sources.common import web_image
from tests.support.source_rows import conversations, only, prepare, reasons

URLS = [f"https://example.org/{i}.jpg" for i in range(6)]


@pytest.mark.parametrize("as_list", [False, True])
def test_multi_image_questions(as_list):
    asked, said = ["Which is larger?", "How many dogs are in both?"], ["The first.", "Three."]
    pairs = {"question": asked, "answer": said}
    if as_list:
        pairs = [{"question": q, "answer": a} for q, a in zip(asked, said, strict=True)]
    rows = [{"image_urls": URLS[:count], "qa_pairs": pairs} for count in (1, 2, 5, 6)]
    samples, skips = prepare("pixmo_multi_image_qa_multi_only_max5", rows)
    assert [len(sample.images) for sample in samples] == [2, 5] and samples[0].images[1] == web_image(URLS[1])
    assert samples[0].annotations == [
        {"style": "correction_qa", "question": asked[0], "answer": said[0]},
        {"style": "correction_qa", "question": asked[1], "answer": said[1], "no_pointing": [0]},
    ]
    assert set(reasons(skips).values()) == {"not 2 to 5 images"} and len(skips) == 2
    assert (asked[0], said[0]) in [turn for (turn,) in conversations(samples[0])]


def multi_point_row(**changes):
    names = [hashlib.sha256(url.encode()).hexdigest() for url in URLS[:3]]
    return {
        "images": [f"pixmo_images/{name}" for name in names],
        "labels": ["Dogs", "the dog", "Cats"],
        "normalized_labels": ["dog", "dog", "cat"],
        "points": [[{"x": 10.0, "y": 20.0}], [{"x": -1.0, "y": 50.0}], []],
        "counts": [1, 1, 0],
        **changes,
    }


TABLES = {"allenai/pixmo-points": [{"image_url": url} for url in URLS[:2] * 2]}


def test_points_in_several_pictures():
    samples, skips = prepare("pixmo_multi_points", [multi_point_row()], tables=TABLES)
    sample = only(samples)
    assert list(sample.images[:2]) == [web_image(URLS[0]), web_image(URLS[1])]
    assert isinstance(sample.images[2], File), "an image whose URL is not known must be below --source"
    assert [(tree[0]["style"], tree[0]["label"]) for tree in sample.variants] == [
        ("multi_image_pointing", "Dogs"),
        ("multi_image_point_then_count", "Dogs"),
        ("multi_image_pointing", "Cats"),
        ("multi_image_point_then_count", "Cats"),
    ]
    dogs, cats = sample.variants[0][0], sample.variants[2][0]
    assert dogs["points"] == [[[10.0, 20.0]], [[-1.0, 50.0]], []] and cats["points"] == [[], [], []]
    turns = {turn for seed in range(40) for (turn,) in conversations(sample, seed=seed)}
    answers = {answer for _, answer in turns}
    tag = '<points coords="1 1 100 200;2 2 000 500">Dogs</points>'
    assert {tag, f"Counting the {tag} shows a total of 2.", "There are none."} <= answers
    assert not skips


def test_points_with_unequal_lists():
    samples, skips = prepare("pixmo_multi_points", [multi_point_row(labels=["Dogs"])], tables=TABLES)
    assert not samples and only(skips).reason == "lists of different lengths"


def mantis_row(name, images=2, **changes):
    return {
        "example_id": f"{name}_7",
        "subset": name,
        "images": [f"mantis-instruct/{name}/train_images/sub/{i}.jpg" for i in range(images)],
        "mc_question": ["Which picture shows a cat?"],
        "oe_question": ["Where is a cat?"],
        "direct_answer": ["the second"],
        "choices": [["the first", "the second", "none"]],
        "correct_choice_idx": [1],
        **changes,
    }


@pytest.mark.parametrize("name", ["llava_665k_multi", "nlvr2", "spot-the-diff"])
def test_mantis(name):
    rows = [
        mantis_row(name),
        mantis_row(name, images=1),
        mantis_row(name, correct_choice_idx=[3]),
        mantis_row(name, choices=[]),
    ]
    samples, skips = prepare(f"mantis_instruct_{name}_multi_only", rows)
    sample = only(samples)
    archive = HubFile("TIGER-Lab/Mantis-Instruct", f"{name}/train_images.zip")
    assert sample.images[1] == FirstOf(
        File(f"mantis-instruct/{name}/train_images/sub/1.jpg"), ArchiveMember(archive, "sub/1.jpg")
    )
    assert reasons(skips) == {
        "00000001": "a single image",
        "00000002#0": "no such option",
        "00000003": "lists of different lengths",
    }
    orders = set()
    for seed in range(30):
        ((asked, answer),) = only(conversations(sample, seed=seed))
        if "second" in answer:  # the whole option, not only its letter
            orders.add(tuple(sorted(("first", "second", "none"), key=asked.index)))
            assert "first" not in answer
    assert len(orders) > 2, "the order of the options is drawn at every access"
