"""Imported wordings in prompts: every style draws from the file, multiple choice is laid out as published."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from molmo2_nemo.data import templates as templates_of_ours
from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.config import TextFormatConfig
from molmo2_nemo.data.prompts import PromptFormatter, VisualContext
from molmo2_nemo.data.published_choice import published_choice
from molmo2_nemo.data.published_wordings import read_checkout
from molmo2_nemo.data.wordings import ChoiceWords, save
from molmo2_nemo.errors import DataError
from tests.support.official_shape import write_checkout

IMAGES = VisualContext(((640, 480),) * 3)
VIDEO = VisualContext((), (640, 480), np.arange(0, 4, 0.5))
FRAMES = [{"time": t, "points": {"0": {"point": [10, 10 * t], "occluded": False}}} for t in (0.5, 1.0, 1.5, 2.0)]
TRACK = {"label": "ball", "points": FRAMES, "width": 640, "height": 480, "sampling_fps": 2}
ANNOTATIONS = [
    *({"style": name, "text": "words"} for name in ("long_caption", "short_caption", "video_long_caption")),
    *({"style": name, "text": "words"} for name in ("video_short_caption", "video_transcript", "video_motion_caption")),
    {"style": "video_object_caption", "text": "words", "object": "dog"},
    *({"style": f"video_clip_{k}_start_end", "text": "w", "start": 1, "end": 2} for k in ("caption", "transcript")),
    {"style": "video_frame_caption_timestamp", "text": "w", "time": 1.5},
    {"style": "video_short_answer", "question": "Q {label}?", "answer": "A"},
    {"style": "cosyn_chart_exp", "question": "Q?", "answer": "A", "explanation": "E."},
    *({"style": name, "label": "cars", "points": [[1, 2]]} for name in ("pointing", "point_count", "count")),
    {"style": "count_then_point", "label": "cars", "points": [[1, 2]]},
    *(
        {"style": name, "label": "cars", "points": [[[1, 2]]], "timestamps": [0.5], "point_scale": 100}
        for name in ("video_point", "video_point_count", "video_count", "video_count_point")
    ),
    *(
        {"style": f"multi_image_{name}", "label": "cars", "points": [[[1, 2]], [], [[3, 4]]]}
        for name in ("pointing", "point_then_count", "count_then_point", "counting")
    ),
    *({"style": f"video_point_{name}", **TRACK} for name in ("track_per_frame", "ground_start_end", "track_start_end")),
    {"style": "video_point_track_all_frames", **TRACK},
    {"style": "video_single_point_track_per_frame", **TRACK},
]


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordings")
    save(read_checkout(write_checkout(folder / "checkout")).wordings, folder / "w.json")
    return str(folder / "w.json")


def users(formatter, annotation, draws):
    video = annotation["style"].startswith("video")
    context = VIDEO if video else IMAGES
    read = read_annotation(annotation, len(context.image_sizes), video)
    return {formatter.conversation(read, context, np.random.default_rng(s))[0].user for s in range(draws)}


@pytest.mark.parametrize("annotation", ANNOTATIONS, ids=lambda a: a["style"])
def test_every_style_takes_its_wordings_from_the_file(templates, annotation):
    formatter = PromptFormatter(TextFormatConfig(templates=templates))
    found = users(formatter, annotation, 60)
    style = annotation["style"]
    prefix = re.escape(formatter.prefix(style, "", np.random.default_rng(0)))
    medium = "video" if style in ("video_point", "video_short_answer", "video_long_caption") else "(video|image)"
    for text in found:
        assert re.match(rf"({prefix}|{style}_in_seconds:)? ?made \w+ \d+ of an {medium}", text), text
        assert not re.search(r"\{(?!label\}\?)\w*\}", text), text  # the question has one of its own
    one = annotation["style"] == "cosyn_chart_exp"
    assert len(found) >= (1 if one else 4)
    if "start" in annotation or "time" in annotation:
        seconds = [text for text in found if "_in_seconds" in text]
        assert seconds and len(seconds) < len(found)
        assert not any("00:00" in text for text in seconds)
        assert all("00:00:0" in text for text in found - set(seconds))


def test_requests_not_to_point(templates):
    formatter = PromptFormatter(TextFormatConfig(templates=templates))
    found = users(formatter, {"style": "user_qa", "question": "How many?", "answer": "2", "no_pointing": [0]}, 60)
    assert len(found) > 20
    assert all(re.fullmatch(r"made request \d+ without points:\nHow many\?", text) for text in found)


QUESTIONS = {  # style -> the class of the made checkout, one of our questions and one that is the user's own
    "kinetics_label": ("Kinetics710", templates_of_ours.PERSON_QUESTIONS[3], "What does she do?"),
    "charades_sta": ("CharadesSTA", templates_of_ours.ACTION_QUESTIONS[0], "What is that?"),
    "coin_label": ("COIN", templates_of_ours.ACTION_QUESTIONS[2], templates_of_ours.PERSON_QUESTIONS[3]),
}


@pytest.mark.parametrize("style", QUESTIONS)
def test_questions_about_labels(templates, style):
    """A question that was drawn when the shards were prepared is one of theirs; other questions stay as they are."""
    formatter = PromptFormatter(TextFormatConfig(templates=templates))
    name, ours, other = QUESTIONS[style]
    record = {"style": style, "question": ours, "answer": "yawning"}
    found = users(formatter, record, 40)
    assert len(found) >= 3
    assert all(re.fullmatch(rf"{style}: made {name} \d, what is done\?", text) for text in found)
    assert users(formatter, {**record, "question": other}, 3) == {f"{style}: {other}"}
    assert users(formatter, {**record, "style": "user_qa"}, 3) == {ours}
    assert users(PromptFormatter(TextFormatConfig()), record, 3) == {f"{style}: {ours}"}


def test_questions_about_antonyms(templates):
    formatter = PromptFormatter(TextFormatConfig(templates=templates))
    ours = templates_of_ours.PAXION_QUESTIONS[1]
    record = {"style": "video_multiple_choice", "question": ours, "answer_idx": 0}
    found = users(formatter, {**record, "options": ["opening", "closing", "Not sure"]}, 40)
    assert all("made Paxion" in text and ours not in text for text in found)
    kept = users(formatter, {**record, "options": ["opening", "closing"]}, 40)
    assert all("made Paxion" not in text and ours in text for text in kept)


def test_what_is_not_drawn_stays_as_it_is(templates):
    """Stage 1, evaluation and questions to a model do not depend on the file; captions of records when asked do."""
    choice = {"style": "a_okvqa_mc", "question": "Q?", "options": ["red", "blue"], "answer_idx": 1}
    for config in ({"prompt_templates": "none", "system_prompt": "style_and_length_v2"}, {}):
        own, imported = TextFormatConfig(**config), TextFormatConfig(**config, templates=templates)
        asked = [PromptFormatter(c, training=False) for c in (own, imported)]
        assert users(asked[0], choice, 5) == users(asked[1], choice, 5)
        texts = [f.question("Q?", "vqa2", np.random.default_rng(0), options=["a", "b"]) for f in asked]
        assert texts[0] == texts[1]
    assert all("made" in t for t in users(PromptFormatter(imported, training=False), ANNOTATIONS[0], 5))


# --- multiple choice --------------------------------------------------------------------------------------------------

WORDS = ChoiceWords(
    common_markers=("{name}. ", "({name}) "),
    other_markers=("{{name}} ", "{name};"),
    bullets=("*", "+"),
    separators=(";", " // "),
    names=(("A", "B", "C"), ("1", "2", "3", "4")),
    name_words=("letter", "number"),
    name_instructions=("say its {name}",),
    instructions=("choose",),
    named_instructions=("say {name} and text",),
    layouts=("{question}|{options}|{instruction}",),
    name_layouts=("by {name}: {question}|{options}",),
    plain_layouts=("plain: {question}|{options}",),
)
OPTIONS = ("red", "{options}", "two;")


def drawn(count=4000, options=OPTIONS, answer=1, **more):
    return [
        published_choice("Q {name}?", options, answer, np.random.default_rng(s), WORDS, **more) for s in range(count)
    ]


def test_shares_and_parts():
    """Every text is one of the layouts, its parts as they were; the shares are the published ones."""
    kinds: Counter[str] = Counter()
    for text, reply in drawn():
        if text.startswith("Q {name}?\nOnly return"):
            kinds["standard"] += 1
            assert reply == "B. {options}"
            continue
        assert text.count("Q {name}?") == 1 and text.count("{options}") == 1
        head, body, *rest = text.removeprefix("plain: ").split("|")
        instruction = rest[0] if rest else ""
        kinds["instructed" if rest else "not"] += 1
        gap = r"(?:\n(?:\1 )?| //  )"  # the other separator is one that an option ends with
        bare = re.fullmatch(rf"(?:([*+]) )?red{gap}\{{options\}}{gap}two;", body)
        named = re.match(r"(\{A\} |A;|A\. |\(A\) |\{1\} |1;|1\. |\(1\) )red", body)
        assert (bare is None) != (named is None), text
        if reply in ("B", "2"):
            kinds["name"] += 1
            said = head if head.startswith("by ") else instruction
            word = {"B": "letter", "2": "number"}[reply]
            assert re.match(rf"(by|say its) ({word}|identifier|label)\b", said), text
        elif named:
            kinds["named"] += 1
            assert reply in body and reply.endswith("{options}") and reply != "{options}"
            assert re.fullmatch(r"|choose|say (letter|number|identifier|label) and text", instruction), text
        else:
            kinds["bare"] += 1
            assert reply == "{options}" and instruction in ("", "choose")
        kinds["one line"] += "\n" not in body
    share = {name: count / 4000 for name, count in kinds.items()}
    expected = {"standard": 0.1, "instructed": 0.45, "name": 0.225, "bare": 0.135, "one line": 0.09}
    for name, value in expected.items():
        assert abs(share[name] - value) < 4 * (value * (1 - value) / 4000) ** 0.5, (name, share[name])


def test_separators_stand_out_from_options():
    """No separator that an option ends with or that is in the mark; a bare list without one is not put on one line."""
    for text, _ in drawn(1500, ("a;", "b // ")):
        assert " // b" not in text and ";; " not in text and "b // ;" not in text
        if text.startswith("plain: Q {name}?|a;"):
            assert "a;\nb // " in text


def test_names_are_enough_for_the_options():
    texts = [text for text, _ in drawn(300, ("a", "b", "c", "d"))]
    assert any("1. a" in text for text in texts) and not any("(A) a" in text for text in texts)
    with pytest.raises(DataError, match="5 options, but the imported wordings have no kind of names for so many"):
        drawn(40, ("a", "b", "c", "d", "e"))
    with pytest.raises(DataError, match="answer_idx 4 is outside 0..1"):
        drawn(1, ("a", "b"), 4)


def test_a_blank_answer_is_named():
    assert all(reply.strip() for _, reply in drawn(400, ("a", " ", "c")))


def test_same_generator_same_text():
    assert drawn(30) == drawn(30)
