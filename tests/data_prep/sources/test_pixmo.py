"""PixMo rows in their published schema -> samples: captions, points, counts, questions."""

import hashlib

import pytest

from data_prep.sources.base import Context, File, FirstOf, Skip, Url
from data_prep.sources.common import hold_out, web_image
from data_prep.sources.pixmo import conversation_turns
from tests.support.source_rows import conversations, only, prepare, reasons

CAT, DOG = "https://example.org/cat.jpg", "https://example.org/dog.jpg"
EVAL = {"allenai/pixmo-points-eval": [{"image_url": "https://example.org/eval.jpg"}]}


def caption_row(url=CAT, caption="A cat on a red sofa.", transcripts=("There is a cat.", "I see a sofa.")):
    return {"image_url": url, "caption": caption, "transcripts": list(transcripts)}


def point_row(label, points, url=CAT, method="pointing", sha256="ab" * 32):
    return {
        "image_url": url,
        "image_sha256": sha256,
        "points": [{"x": x, "y": y} for x, y in points],
        "count": len(points),
        "label": label,
        "collection_method": method,
    }


def test_stage_1_captions_carry_one_transcript_per_access():
    samples, skips = prepare("pixmo_cap_with_transcripts", [caption_row()])
    sample = only(samples)
    assert not skips and list(sample.images) == [web_image(CAT)]
    assert [[(a["style"], a["text"]) for a in variant] for variant in sample.variants] == [
        [("long_caption", "A cat on a red sofa."), ("transcript", "There is a cat.")],
        [("long_caption", "A cat on a red sofa."), ("transcript", "I see a sofa.")],
    ]
    said = conversations(sample, stage1=True)
    assert {answer for ((_, answer),) in said} >= {"A cat on a red sofa."} and len(said) == 2
    assert all(prompt.startswith(("long_caption", "transcript")) for ((prompt, _),) in said)


def test_captions_without_usable_transcripts():
    rows = [caption_row(transcripts=["", "One."]), caption_row(transcripts=[]), caption_row(caption=" ")]
    samples, skips = prepare("pixmo_cap_with_transcripts", rows)
    assert [len(sample.annotations) for sample in samples] == [2, 1]
    assert sorted(reasons(skips).values()) == ["empty caption", "no transcript"]


def test_sft_captions():
    sample = only(prepare("pixmo_cap", [{"image_url": DOG, "caption": "A dog."}])[0])
    assert sample.annotations == [{"style": "long_caption", "text": "A dog."}]
    ((prompt, answer),) = only(conversations(sample))
    assert answer == "A dog." and ":" not in prompt


def test_web_images_may_be_there_already():
    found = web_image(CAT, "00")
    name = hashlib.sha256(CAT.encode()).hexdigest()
    assert found == FirstOf(File(f"pixmo_images/{name}"), Url(CAT, "00"))


def test_the_same_image_may_come_twice():
    samples, _ = prepare("pixmo_cap", [{"image_url": DOG, "caption": "A."}, {"image_url": DOG, "caption": "B."}])
    assert len({sample.key for sample in samples}) == 2


def test_both_stages_hold_out_the_same_images():
    rows = [caption_row(url=f"https://example.org/{i}.jpg") for i in range(200)]
    held = []
    for name in ("pixmo_cap", "pixmo_cap_with_transcripts"):
        samples, skips = prepare(name, rows)
        assert len(samples) == 180 and {skip.reason for skip in skips} == {"held out for validation"}
        held.append({skip.key for skip in skips})
    assert held[0] == held[1] and len(held[0]) == 20
    assert {skip.key for skip in prepare("pixmo_cap", rows, seed=1)[1]} != held[0]


def test_hold_out_counts_and_does_not_depend_on_order():
    ctx = Context.for_tests()
    entries = [(f"k{i}", i) for i in range(100)]
    found = list(hold_out(entries, ctx, "name", 7))
    held = {entry.key for entry in found if isinstance(entry, Skip)}
    assert len(held) == 7 and len(found) == 100
    again = list(hold_out(reversed(entries), ctx, "name", 7))
    assert {entry.key for entry in again if isinstance(entry, Skip)} == held
    assert {entry[0] for entry in again if not isinstance(entry, Skip)} == {key for key, _ in entries} - held
    few = list(hold_out(entries[:12], ctx, "name", 7))
    assert sum(isinstance(entry, Skip) for entry in few) == 1, "a tenth of a small set"


def test_points_are_grouped_by_image_and_mode_is_drawn():
    rows = [
        point_row("Ears", [(20.5, 10), (30, 12.25)]),
        point_row("Nose", [(50, 60)], url=DOG),
        point_row("tails", []),
        point_row("cars", [(1, 1)] * 3, method="counting"),
    ]
    samples, skips = prepare("pixmo_points_train", rows, tables=EVAL)
    cat, dog = samples
    assert not skips and list(cat.images) == [web_image(CAT, "ab" * 32)]
    assert [[a["style"] for a in tree] for tree in cat.variants] == [["point_count"] * 2, ["pointing"] * 2]
    ears, tails = cat.variants[0]
    assert ears["points"] == [[20.5, 10.0], [30.0, 12.25]] and ears["point_scale"] == 100 and ears["label"] == "Ears"
    assert tails["points"] == []
    asked = {answer for seed in range(6) for ((_, answer),) in conversations(cat, seed=seed)}
    assert "There are none." in asked
    assert any("shows a total of 2" in answer for answer in asked)
    assert '<points coords="1 1 205 100 2 300 122">ears</points>' in asked
    counting = only(prepare("pixmo_points_high_freq_train", rows, tables=EVAL)[0])
    assert [a["label"] for a in counting.variants[1]] == ["cars"]
    assert dog.key != cat.key


def test_points_filters():
    """Labels above 60 points go; an image is split so that no part has more than 60; evaluation images go."""
    many = [(i, i) for i in range(61)]
    rows = [
        point_row("a", [(1, 1)] * 40),
        point_row("crowd", many),
        point_row("b", [(1, 1)] * 20),
        point_row("c", [(1, 1)] * 41),
        point_row("d", [(1, 1)]),
        point_row("e", [(1, 1)], url="https://example.org/eval.jpg"),
        point_row("f", many, url=DOG),
    ]
    samples, skips = prepare("pixmo_points_train", rows, tables=EVAL)
    assert [[a["label"] for a in sample.variants[0]] for sample in samples] == [["a", "b"], ["c", "d"]]
    assert len({sample.key for sample in samples}) == 2
    assert reasons(skips) == {
        f"{CAT}#1": "more than 60 points",
        f"{DOG}#0": "more than 60 points",
        "https://example.org/eval.jpg": "image of pixmo-points-eval",
    }


def test_points_out_of_the_picture_are_moved_to_its_edge():
    sample = only(prepare("pixmo_points_train", [point_row("bird", [(-3, 104)])], tables=EVAL)[0])
    assert '"1 1 000 1000"' in conversations(sample, seed=1)[0][0][1]


@pytest.mark.parametrize("points", [{"x": [40.0, 8.0], "y": [30.0, 6.0]}, [{"x": 40, "y": 30}, {"x": 8, "y": 6}]])
def test_counts_are_in_pixels(points):
    row = {"image_url": CAT, "image_sha256": "00", "count": 2, "points": points, "label": "people"}
    samples, skips = prepare("pixmo_count_train", [row, {**row, "points": None}])
    sample = only(samples)
    assert only(skips).reason == "no points" and list(sample.images) == [web_image(CAT)]
    assert [tree[0]["style"] for tree in sample.variants] == ["point_count", "pointing"]
    answers = {conversations(sample, seed=seed)[0][0][1] for seed in range(6)}  # pictures of 80 x 60
    tag = '<points coords="1 1 100 100 2 500 500">people</points>'
    assert answers == {tag, f"Counting the {tag} shows a total of 2."}


def question_row(question, answer, url=CAT):
    return {"image_url": url, "image_sha256": "cd" * 32, "question": question, "answer": answer}


def test_ask_model_anything():
    rows = [
        question_row(" What is this? ", "A cat."),
        question_row("Is it wet?", "No.", url=DOG),
        question_row("How many cats are there?", "Two."),
        question_row("Who?", "  "),
        question_row("Why?", "", url="https://example.org/empty.jpg"),
    ]
    samples, skips = prepare("pixmo_ask_model_anything", rows)
    cat, dog = samples
    assert cat.annotations == [
        {"style": "user_qa", "question": "What is this?", "answer": "A cat."},
        {"style": "user_qa", "question": "How many cats are there?", "answer": "Two.", "no_pointing": [0]},
    ]
    assert list(cat.images) == [web_image(CAT, "cd" * 32)] and len(dog.annotations) == 1
    assert reasons(skips) == {f"{CAT}#2": "empty answer", "https://example.org/empty.jpg#0": "empty answer"}
    counted = next(turn for (turn,) in conversations(cat) if turn[1] == "Two.")
    assert counted[0].endswith("How many cats are there?") and len(counted[0]) > len("How many cats are there?")


def test_caption_questions_with_several_turns():
    rows = [
        {"image_url": CAT, "question": "[USER] What is it? [ASSISTANT]", "answer": "A cat."},
        {
            "image_url": CAT,
            "question": "[USER] Say hi. [ASSISTANT] Hi! [USER] How many ears does\nit have? [ASSISTANT]",
            "answer": "Two.",
        },
        {"image_url": CAT, "question": "What is it?", "answer": "A cat."},
    ]
    samples, skips = prepare("pixmo_cap_qa_as_user_qa", rows)
    first, second = only(samples).annotations
    assert first == {"style": "user_qa", "messages": ["What is it?", "A cat."]}
    assert second["messages"] == ["Say hi.", "Hi!", "How many ears does\nit have?", "Two."]
    assert second["no_pointing"] == [1]
    assert reasons(skips) == {f"{CAT}#2": "not a conversation"}
    both = sorted(conversations(only(samples)), key=len)
    assert [len(turns) for turns in both] == [1, 2] and both[1][0] == ("Say hi.", "Hi!")


@pytest.mark.parametrize(
    "question",
    [
        "[ASSISTANT] Hi [USER] And? [ASSISTANT]",
        "[USER] One [USER] Two [ASSISTANT]",
        "[USER] One [ASSISTANT] not the end",
        "[USER]  [ASSISTANT]",
        "",
    ],
)
def test_marks_that_make_no_conversation(question):
    with pytest.raises(ValueError):
        conversation_turns(question, "Answer.")
