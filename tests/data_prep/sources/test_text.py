"""Tulu and the fixed answers: rows in their published schema -> samples."""

import pytest

from data_prep.sources.base import Inline, Prepared
from data_prep.sources.text import COPIES, chat_turns
from tests.support.source_rows import conversations, png, prepare, reasons


def chat(*said, system=None):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def tulu_row(**changes):
    return {
        "id": "x_1",
        "source": "ai2-adapt-dev/flan",
        "category": "general",
        "messages": chat("Hello?", "Hi!"),
        "first_message_qwen3_tokens": 3,
        "empty_messages": False,
        "has_special_token": False,
        **changes,
    }


FILTERED = {
    "an empty message": {"empty_messages": True},
    "special tokens in the text": {"has_special_token": True},
    "fixed answers of another model": {"source": "allenai/hardcoded-olmo"},
    "puzzles": {"source": "allenai/puzzle_data_160k-ngram-filtered"},
    "reasoning": {"source": "allenai/verifiable-reasoning-filtered-o4-mini-filtered"},
    "category code": {"category": "code"},
    "category non-english": {"category": "non-english"},
    "not a conversation": {"messages": [{"role": "assistant", "content": "Hi"}]},
}


def test_tulu():
    rows = [tulu_row(), tulu_row(id="x_2", messages=chat("A", "B", "C", "D", system="Be kind."))]
    rows += [tulu_row(id=reason, **changes) for reason, changes in FILTERED.items()]
    rows += [
        tulu_row(source="allenai/dino-hardcodes"),
        tulu_row(source="faezeb/verifiable-reasoning-v3-o4-mini-length-filtered-verified"),
    ]
    samples, skips = prepare("tulu4", rows)
    assert [sample.annotations[0]["messages"] for sample in samples] == [
        ["Hello?", "Hi!"],
        ["System: Be kind.\nA", "B", "C", "D"],
    ]
    assert not samples[0].images and samples[0].annotations[0]["style"] == "text_sft"
    found = [skip.reason for skip in skips]
    assert found == [*FILTERED, "fixed answers of another model", "reasoning"]
    assert conversations(samples[1]) == [[("System: Be kind.\nA", "B"), ("C", "D")]]
    asked = conversations(samples[0], stage1=True)[0][0][0]
    assert asked.startswith("text_sft") and asked.endswith("Hello?")


@pytest.mark.parametrize(("name", "limit"), [("tulu4", 4096), ("tulu4_max_2304", 2304)])
def test_first_messages_are_bounded(name, limit):
    rows = [tulu_row(first_message_qwen3_tokens=limit + extra, category=None) for extra in (0, 1)]
    samples, skips = prepare(name, rows)
    assert len(samples) == 1 and reasons(skips) == {"00000001": f"first message longer than {limit} tokens"}


def test_turns_of_a_chat():
    assert chat_turns(chat("A", "B", "C")) == ["A", "B"], "nobody answers the last question"
    for messages in ([], chat("A"), chat(system="Only a system."), chat("A", "B")[::-1], [*chat("A"), *chat("A", "B")]):
        with pytest.raises(ValueError):
            chat_turns(messages)


OWN = {"questions": ["Who made this?"], "response": "Ai2 made me.", "images": [{"bytes": png(), "path": None}] * 2}
GENERAL = {"questions": [f"Who are you, {i}?" for i in range(60)], "response": "I am Molmo.", "images": []}


def test_fixed_answers_with_their_own_pictures():
    samples, _ = prepare("molmo2_hardcodes", [OWN, {**OWN, "images": None}])
    assert [list(sample.images) for sample in samples[:2]] == [[Inline(png())]] * 2
    assert samples[0].annotations == [{"style": "user_qa", "question": "Who made this?", "answer": "Ai2 made me."}]
    assert len(samples) == 2 + COPIES and not any(sample.images or sample.video for sample in samples[2:])
    assert conversations(samples[0]) == [[("Who made this?", "Ai2 made me.")]]


def test_fixed_answers_with_random_roots():
    sizes = {"pixmo_cap": 40, "pixmo_ask_model_anything": 2, "molmo2_human_qa": 7}
    samples, skips = prepare("molmo2_hardcodes", [GENERAL], prepared=sizes)
    assert len(samples) == 60 * COPIES and not skips
    counts = {"image": 0, "several": 0, "video": 0, "none": 0}
    drawn = set()
    for sample in samples:
        kind = (
            "video" if sample.video else ("none", "image")[len(sample.images)] if len(sample.images) < 2 else "several"
        )
        counts[kind] += 1
        assert len(sample.images) <= 5
        for medium in [*sample.images, *([sample.video] if sample.video else [])]:
            assert isinstance(medium, Prepared) and 0 <= medium.record < sizes[medium.name]
            drawn.add(medium.name)
    assert drawn == set(sizes)
    for kind, share in (("image", 0.25), ("video", 0.25), ("several", 0.15), ("none", 0.35)):
        assert abs(counts[kind] / len(samples) - share) < 0.08, counts
    assert samples == prepare("molmo2_hardcodes", [GENERAL], prepared=sizes)[0]
    assert samples != prepare("molmo2_hardcodes", [GENERAL], prepared=sizes, seed=1)[0]


def test_fixed_answers_without_videos():
    samples, _ = prepare("molmo2_hardcodes", [GENERAL], prepared={"pixmo_cap": 3})
    assert not any(sample.video for sample in samples) and any(sample.images for sample in samples)
