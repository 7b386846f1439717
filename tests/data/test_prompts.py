"""Prompts and answers: the reference's prefixes and formats, and every style once with both stages' settings."""

import re

import numpy as np
import pytest

from molmo2_nemo.data import annotations, multiple_choice, styles, templates
from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.config import TextFormatConfig
from molmo2_nemo.data.points import parse
from molmo2_nemo.data.prompts import PromptFormatter, VisualContext, time_text
from molmo2_nemo.data.styles import canonical_style
from molmo2_nemo.errors import DataError

STAGE1 = TextFormatConfig("none", "style_and_length_v2", "html-v1", False, False)
STAGE2 = TextFormatConfig()
CONTEXT = VisualContext(((640, 480), (100, 100), (50, 50)), (640, 480), np.arange(0, 4, 0.5))


class Scripted:
    """A generator that returns given numbers, for checking the order and the use of draws."""

    def __init__(self, *values, normal=0.0):
        self.values, self._normal = list(values), normal

    def random(self):
        return self.values.pop(0)

    def normal(self, scale):
        return self._normal * scale

    def integers(self, low, high=None):
        return 0 if high is None else low


def seeded(seed=0):
    return np.random.default_rng(seed)


def said(formatter, annotation, rng, context=CONTEXT):
    """The conversation of an annotation that is read from a record with the context's images or video."""
    read = read_annotation(annotation, len(context.image_sizes), context.video_size is not None)
    return formatter.conversation(read, context, rng)


def one(annotation, config=STAGE2, training=True, seed=0, context=CONTEXT):
    (turn,) = said(PromptFormatter(config, training=training), annotation, seeded(seed), context)
    return turn


# --- prefixes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "style, expected",
    [
        ("vqa2", "vqa2: Q?"),
        ("demo", "demo: Q?"),
        ("user_qa", "Q?"),
        ("correction_qa", "Q?"),
        ("eval_short_answer", "vqa2: Q?"),
        ("video_eval_short_answer", "video_short_answer: Q?"),
    ],
)
def test_style_prefix(style, expected):
    assert PromptFormatter(STAGE2, training=False).question("Q?", style, seeded()) == expected


def test_styles_that_keep_their_prefix():
    formatter = PromptFormatter(STAGE2)
    for style in ("video_short_answer", "video_point_ground_start_end", "video_single_point_track_per_frame"):
        assert formatter.prefix(style, "", seeded()) == f"{style}:"
    for style in styles.DEMO_STYLES | styles.MC_STYLES:
        assert formatter.prefix(style, "", seeded()) == ""


def test_length_prefix():
    formatter = PromptFormatter(STAGE1)
    assert formatter.prefix("long_caption", "x" * 1000, Scripted(0.5)) == "long_caption 66:"
    assert formatter.prefix("long_caption", "x" * 1000, Scripted(0.5, normal=-0.96)) == "long_caption 65:"  # 976 // 15
    assert formatter.prefix("long_caption", "x", Scripted(0.11, normal=-1.0)) == "long_caption -2:"  # -24 // 15
    assert formatter.prefix("long_caption", "x" * 1000, Scripted(0.10)) == "long_caption:"
    for style in ("pointing", "point_count", "cosyn_point"):
        assert formatter.prefix(style, "x" * 1000, Scripted()) == f"{style}:"
    assert PromptFormatter(STAGE1, training=False).prefix("vqa2", "", Scripted()) == "vqa2 65:"
    assert PromptFormatter(STAGE1, training=False, inference_length=None).prefix("vqa2", "", Scripted()) == "vqa2:"


def test_prefix_goes_to_the_first_turn_and_counts_the_last_answer():
    annotation = {"style": "text_sft", "messages": ["u1", "a" * 30, "u2", "b" * 300]}
    turns = said(PromptFormatter(STAGE1), annotation, Scripted(0.9))
    assert [(t.user, t.answer) for t in turns] == [("text_sft 20: u1", "a" * 30), ("u2", "b" * 300)]
    assert [t.user for t in said(PromptFormatter(STAGE2), annotation, seeded())] == ["u1", "u2"]


def test_stage_1_captions_are_the_prefix_alone():
    turn = said(PromptFormatter(STAGE1), {"style": "long_caption", "text": "x" * 150}, Scripted(0.9))[0]
    assert (turn.user, turn.answer) == ("long_caption 10:", "x" * 150)
    turn = one({"style": "pointing", "label": "Red Cars", "points": [[5, 5]], "point_scale": 10}, STAGE1)
    assert (turn.user, turn.answer) == ("pointing: red cars", '<points coords="1 1 500 500">red cars</points>')


@pytest.mark.parametrize(
    "style, base",
    [
        ("eval_multiple_choice", "a_okvqa_mc"),
        ("eval_multi_image_mc", "multi_image_mc"),
        ("video_eval_multiple_choice", "video_multiple_choice"),
        ("video_short_answer_count_without_pointing", "video_short_answer"),
        ("user_qa", "user_qa"),
    ],
)
def test_aliases(style, base):
    assert canonical_style(style) == base


# --- captions, questions, times -------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", sorted(styles.CAPTIONS))
def test_captions_draw_a_wording(style):
    seen = {one({"style": style, "text": "words"}, seed=s).user for s in range(60)}
    prefix = "" if style in styles.DEMO_STYLES else f"{style}: "
    assert len(seen) >= 4
    known = {text.replace("{object}", annotations.MAIN_OBJECT) for text in templates.OWN[style]}
    assert seen <= {prefix + text for text in known}


def test_prompt_field_wins():
    assert one({"style": "long_caption", "text": "words", "prompt": "Say it."}).user == "Say it."


def test_video_wordings_do_not_speak_of_pictures():
    texts = [t for name, value in vars(templates).items() if name.startswith("VIDEO_") for t in value]
    assert len(texts) > 50
    assert not [t for t in texts if re.search("image|picture|photo", t)]


def test_no_wording_twice_and_no_field_left_open():
    for name, value in vars(templates).items():
        if name.isupper() and isinstance(value, tuple):
            assert len(set(value)) == len(value) >= 3, name


def test_questions():
    assert one({"style": "user_qa", "question": "Why {label}?", "answer": "So."}).user == "Why {label}?"
    turn = one({"style": "video_short_answer", "question": "Why {x}?", "answer": "So."})
    assert turn.user.startswith("video_short_answer: ") and "Why {x}?" in turn.user
    turn = one({"style": "cosyn_chart_exp", "question": "Why?", "answer": "So", "explanation": "Because."})
    assert "Why?" in turn.user and len(turn.user) > len("cosyn_chart_exp: Why?")
    assert turn.answer == "Because. Answer: So"


def test_most_frequent_answer():
    annotation = {"style": "vqa2", "question": "Q", "answers": ["b", "a", "b", "c"]}
    assert {one(annotation, seed=s).answer for s in range(5)} == {"b"}
    assert {one({**annotation, "answers": ["a", "b"]}, seed=s).answer for s in range(20)} == {"a", "b"}


def test_answers_with_points_inside():
    entry = {"points": [[10, 20]], "inline_text": "the car", "alt_text": "red car"}
    annotation = {"style": "user_qa", "question": "Q", "answer": "See <|POINT|>.", "answer_annotations": [entry]}
    assert one(annotation).answer == 'See <points alt="red car" coords="1 1 100 200">the car</points>.'


@pytest.mark.parametrize(
    "seconds, plain, clock", [(65.25, "65.2", "00:01:05.2"), (0, "0", "00:00:00.0"), (3599.97, "3600.0", "01:00:00.0")]
)
def test_times(seconds, plain, clock):
    assert (time_text(seconds, True), time_text(seconds, False)) == (plain, clock)


def test_timed_captions_draw_the_format():
    annotation = {"style": "video_clip_caption_start_end", "start": 1.0, "end": 65.25, "text": "words"}
    users = {one(annotation, seed=s).user for s in range(40)}
    assert any("65.2" in u and "00:01:05.2" not in u for u in users) and any("00:01:05.2" in u for u in users)
    frame = {"style": "video_frame_caption_timestamp", "time": 65.2, "text": "words"}
    assert all(re.search("00:01:05.2|65.2", one(frame, seed=s).user) for s in range(10))


# --- multiple choice ------------------------------------------------------------------------------------------------

CHOICE = {"style": "a_okvqa_mc", "question": "Which {o}?", "options": ["red", "blue", "green"], "answer_idx": 1}


def test_standard_choice():
    turn = one(CHOICE, training=False)
    assert turn.user == "Which {o}?\nOnly return the correct answer option.\nA. red\nB. blue\nC. green"
    assert turn.answer == "B. blue"
    bare = one({**CHOICE, "unlabelled_options": True}, training=False)
    assert (bare.user.splitlines()[2:], bare.answer) == (["red", "blue", "green"], "blue")


def test_stage_1_choice():
    turn = said(PromptFormatter(STAGE1), CHOICE, Scripted(0.05))[0]
    assert (turn.user, turn.answer) == ("a_okvqa_mc: Which {o}?\nA. red\nB. blue\nC. green\n", "B. blue")


def test_training_layouts_of_multiple_choice():
    turns = [one(CHOICE, seed=s) for s in range(600)]
    assert all(turn.user.count("Which {o}?") == 1 for turn in turns)
    for turn in turns:
        assert all(option in turn.user for option in CHOICE["options"])
        assert not re.search(r"\{[qin]\}", turn.user)
        # The answer is the option, or its name, which stands before it.
        if "blue" not in turn.answer:
            assert re.search(re.escape(turn.answer) + r"\W{1,5}blue", turn.user), turn
        else:
            assert turn.answer in turn.user
    name_only = np.mean(["blue" not in turn.answer for turn in turns])
    bare = np.mean([turn.answer == "blue" for turn in turns])
    assert 0.17 < name_only < 0.28  # 0.9 * 0.25
    assert 0.09 < bare < 0.19  # 0.9 * 0.75 * 0.2
    assert len({turn.user for turn in turns}) > 400


def test_blank_correct_options_are_always_named():
    blank = {**CHOICE, "options": ["red", " ", "green"]}
    assert all(one(blank, seed=s).answer.strip() for s in range(200))


def test_multiple_choice_needs_options():
    with pytest.raises(ValueError, match="1 to 26 options, got 27"):
        one({**CHOICE, "options": ["x"] * 27})
    with pytest.raises(DataError, match="answer_idx must be 0..2 for 3 options, not 3"):
        one({**CHOICE, "answer_idx": 3})
    many = {**CHOICE, "options": [f"o{i}" for i in range(26)]}
    assert {one(many, seed=s).answer for s in range(30)}
    assert multiple_choice.NAMES[3] == ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")


# --- points and tracks ----------------------------------------------------------------------------------------------


def test_pointing_and_counting():
    annotation = {"style": "pointing", "label": "Red Cars", "points": [[100, 50], [20, 300], [640, 480]]}
    tag = '<points coords="1 1 031 625 2 156 104 3 1000 1000">red cars</points>'
    turn = one(annotation)
    assert turn.answer == tag and "red cars" in turn.user
    assert one({**annotation, "style": "point_count"}).answer == f"Counting the {tag} shows a total of 3."
    assert one({**annotation, "style": "count_then_point"}).answer == f"There are 3 {tag}."
    assert one({**annotation, "style": "count"}).answer == "3"
    assert one({**annotation, "points": []}).answer == "There are none."
    assert one({**annotation, "question": "Where?"}).user == "Where?"
    assert "Red Cars" in one({**annotation, "label_cased": "Red Cars"}).user


def test_video_points():
    annotation = {
        "style": "video_point",
        "label": "ball",
        "points": [[[50, 50]], [[10, 20], [5, 99]], [[33.3, 66.7]]],
        "timestamps": [0.5, 2.0, 12.25],
        "point_scale": 100,
    }
    tag = '<points coords="0.5 1 500 500;2.0 2 050 990 3 100 200;12.2 4 333 667">ball</points>'
    assert one(annotation).answer == tag
    assert one({**annotation, "style": "video_point_count"}).answer == f"Counting the {tag} shows a total of 4."
    with pytest.raises(DataError, match="timestamps must be a list of seconds, 0 or later, not None"):
        one({k: v for k, v in annotation.items() if k != "timestamps"})


def test_multi_image_points():
    annotation = {
        "style": "multi_image_pointing",
        "label": "Dog",
        "points": [[[10, 20], [50, 50]], [], [[99.9, 0]]],
        "point_scale": 100,
    }
    turns = [one(annotation, seed=s) for s in range(200)]
    whole = '<points coords="1 1 100 200 2 500 500;3 3 999 000">dog</points>'
    assert whole in {t.answer for t in turns}
    for turn in turns:
        named = [int(n) for n in re.findall(r"image_(\d)", turn.user)]
        groups = re.findall(r"(?:^|;)(\d) ", re.sub(r".*coords=\"|\">.*", "", turn.answer))
        assert [int(g) for g in groups] == [n for n in (named or [1, 2, 3]) if annotation["points"][n - 1]]
        if named and not groups:
            assert turn.answer == "There are none."
    whole_prompts = [t.user for t in turns if not re.search(r"image_\d", t.user)]
    # About all pictures, half of the wordings are those for a single one.
    assert 0.3 < np.mean(["all images" in user for user in whole_prompts]) < 0.7
    assert 0.3 < np.mean([bool(re.search(r"image_\d", t.user)) for t in turns]) < 0.7


TRACK = {
    "style": "video_point_track_per_frame",
    "label": "people",
    "sampling_fps": 1,
    "width": 640,
    "height": 480,
    "points": [
        {"time": t, "points": {"7": {"point": [100 + 10 * t, 100], "occluded": False}}}
        for t in (0.0, 0.5, 1.0, 2.0, 9.0)
    ],
}


def test_tracks():
    turn = one(TRACK)
    assert turn.answer == '<tracks coords="0.0 1 156 208;1.0 1 172 208;2.0 1 188 208">people</tracks>'
    assert "people" in turn.user and "1" in turn.user
    assert one({name: value for name, value in TRACK.items() if name != "points"}).answer == "There are none."
    assert one({**TRACK, "points": TRACK["points"][-1:]}).answer == "No tracks available."
    hidden = [{"time": 0.0, "points": {"7": {"point": [1, 1], "occluded": True}}}]
    assert one({**TRACK, "points": hidden}).answer == ""
    ends = one({**TRACK, "style": "video_point_ground_start_end"})
    assert ends.answer == '<tracks coords="0.0 1 156 208;2.0 1 188 208">people</tracks>'
    assert ends.user.startswith("video_point_ground_start_end: ")


def test_half_of_the_prompts_at_2_fps_do_not_say_so():
    users = [one({**TRACK, "sampling_fps": 2}, seed=s).user for s in range(200)]
    assert 0.4 < np.mean(["2" in user for user in users]) < 0.6
    assert all("1" in one(TRACK, seed=s).user for s in range(20))


def test_single_object_tracks_start_behind_the_prompt():
    single = {**TRACK, "style": "video_single_point_track_per_frame"}
    turn = one(single, training=False)
    assert '<points coords="0.0 1 156 208">people</points>' in turn.user
    assert turn.answer == '<tracks coords="1.0 1 172 208;2.0 1 188 208">people</tracks>'
    starts = [re.search(r'coords="(\S+)', one(single, seed=s).user)[1] for s in range(300)]
    assert 0.08 < np.mean([s != "0.0" for s in starts]) < 0.2  # 0.2 * 2/3


def test_single_object_tracks_may_start_between_the_answers():
    """The start is any moment the model sees (here every 0.5 s), the answer at the annotation's own rate (1 fps)."""
    single = {**TRACK, "style": "video_single_point_track_per_frame"}
    hidden = [{**f, "points": {}} if f["time"] == 0 else f for f in TRACK["points"]]
    turn = one({**single, "points": hidden}, training=False)
    first = next(f["time"] for f in hidden if f["points"])
    assert f'coords="{float(first)} 1 ' in turn.user and f'coords="{float(first)} 1 ' not in turn.answer
    once = one({**single, "points": TRACK["points"][:1]}, training=False)
    assert '<points coords="0.0 1 156 208">people</points>' in once.user and once.answer == ""
    unseen = VisualContext((), (640, 480), np.array([0.1, 0.6]))  # no annotated moment among them
    turn = one(single, training=False, context=unseen)
    assert '<points coords="0.0 1 156 208">people</points>' in turn.user and turn.answer == "No tracks available."
    with pytest.raises(ValueError, match="needs a visible point"):
        one({**single, "points": [{"time": 0.0, "points": {}}]})


@pytest.mark.parametrize("style", sorted(styles.TRACK_STYLES))
def test_every_track_style(style):
    """Also those of which the reference has only the names; answers can be read back."""
    turns = [one({**TRACK, "style": style, "sampling_fps": 1}, training=False, seed=s) for s in range(60)]
    assert len({turn.user for turn in turns}) >= 4 and len({turn.answer for turn in turns}) == 1
    assert all(("<points" in turn.user) == ("single" in style) for turn in turns)
    (tag,) = parse(turns[0].answer)
    times = [float(group.frame) for group in tag.groups]
    ends = {
        "video_point_track_per_frame": [0.0, 1.0, 2.0],
        "video_point_track_all_frames": sorted(f["time"] for f in TRACK["points"] if f["time"] <= 3.5),
        "video_point_track_start_end": [0.0, max(f["time"] for f in TRACK["points"] if f["time"] <= 3.5)],
        "video_single_point_track_per_frame": [1.0, 2.0],
        "video_single_point_track_start_end": [max(f["time"] for f in TRACK["points"] if f["time"] <= 3.5)],
    }
    assert times == ends.get(style, ends["video_point_track_start_end"])


# --- draws at every access that data_prep asks for ------------------------------------------------------------------


def test_requests_not_to_point():
    """Marked questions of a conversation get one of several requests; where points are asked for nothing changes."""
    chat = {"style": "user_qa", "messages": ["How many?", "2", "Why?", "So.", "And how many now?", "3"]}
    formatter, requests = PromptFormatter(STAGE2), set()
    for seed in range(80):
        turns = said(formatter, {**chat, "no_pointing": [0, 2]}, seeded(seed))
        assert turns[1].user == "Why?" and [t.answer for t in turns] == ["2", "So.", "3"]
        for turn, question in ((turns[0], "How many?"), (turns[2], "And how many now?")):
            request = turn.user.removesuffix(question)
            assert request in templates.NO_POINTING
            requests.add(request)
    assert len(requests) > 15
    assert [t.user for t in said(formatter, chat, seeded())][0] == "How many?"
    turn = one({"style": "vqa2", "question": "How many?", "answer": "2", "no_pointing": [0]})
    assert re.fullmatch(r"vqa2: .+\sHow many\?", turn.user, re.DOTALL)


def test_options_in_a_new_order_at_every_access():
    shuffled = {**CHOICE, "shuffle_options": True}
    orders = set()
    for seed in range(200):
        turn = one(shuffled, seed=seed)
        places = sorted(CHOICE["options"], key=turn.user.index)
        orders.add(tuple(places))
        if "blue" not in turn.answer:
            assert re.search(re.escape(turn.answer) + r"\W{1,5}blue", turn.user), turn
    assert len(orders) == 6
    assert one(shuffled, training=False) == one(CHOICE, training=False)


def test_counting_variants_of_short_answers_have_wordings():
    annotation = {"style": "video_short_answer_count_without_pointing", "question": "How many?", "answer": "2"}
    users = {one(annotation, seed=s).user for s in range(40)}
    assert len(users) > 5 and all(u.startswith("video_short_answer: ") for u in users)


# --- errors and repeatability ---------------------------------------------------------------------------------------

EVERY = [
    {"style": "long_caption", "text": "words"},
    {"style": "user_qa", "question": "Q", "answer": "A"},
    CHOICE,
    {"style": "point_count", "label": "x", "points": [[1, 1]], "point_scale": 100},
    {"style": "multi_image_pointing", "label": "x", "points": [[[1, 1]], [[2, 2]], []], "point_scale": 100},
    {"style": "video_point_count", "label": "x", "points": [[[1, 1]]], "timestamps": [0.5], "point_scale": 100},
    TRACK,
    {"style": "text_sft", "messages": ["u", "a", "u", "a"]},
]


@pytest.mark.parametrize("config", [STAGE1, STAGE2])
@pytest.mark.parametrize("annotation", EVERY, ids=lambda a: a["style"])
def test_same_generator_same_text(annotation, config):
    formatter = PromptFormatter(config)
    first = said(formatter, annotation, seeded(5))
    np.random.seed(1)
    assert said(formatter, annotation, seeded(5)) == first
    assert all(turn.answer for turn in first) and first[0].user


@pytest.mark.parametrize(
    "annotation, message",
    [
        ({"style": "long_caption"}, "answer is missing (answer, answers or text)"),
        ({"style": "long_caption", "text": "  "}, "'long_caption' has an empty answer"),
        ({"style": "pointing", "points": [[1, 1]]}, "label is missing"),
        (
            {"style": "pointing", "label": "x", "points": [["a", 1]]},
            "points[0] must be a point [x, y] with finite numbers, not ['a', 1]",
        ),
        ({"style": "text_sft", "messages": ["u", "a", "u"]}, "end with an answer; there are 3"),
        (
            {"style": "video_point", "label": "x", "points": [[[1, 1]]], "timestamps": []},
            "per timestamp: 0 expected, got 1",
        ),
        ({"style": "video_frame_caption_timestamp", "text": "x"}, "time is missing"),
        (
            {"style": "video_clip_caption_start_end", "text": "x", "start": 0, "end": "1"},
            "end must be a number, not '1'",
        ),
        ({"style": "vqa2", "question": "Q", "answers": "yes"}, "answers must be a list of strings, not 'yes'"),
        ({**TRACK, "sampling_fps": 0.5}, "sampling_fps must be a number of at least 1, not 0.5"),
        ({**TRACK, "points": None}, "points must be the frames of a track, a list, not None"),
    ],
)
def test_bad_annotations(annotation, message):
    with pytest.raises(DataError, match=re.escape(message)):
        one(annotation)


def test_points_need_a_scale():
    with pytest.raises(ValueError, match="none of these is given"):
        one({"style": "pointing", "label": "x", "points": [[1, 1]]}, context=VisualContext())


def test_unknown_settings():
    with pytest.raises(ValueError, match="text.point_format 'xml'; known: html-v1, html-v2"):
        PromptFormatter(TextFormatConfig(point_format="xml"))


def test_either_is_drawn_at_every_access():
    base = {"style": "video_point", "label": "cars", "timestamps": [1.0], "points": [[[50, 50]]], "point_scale": 100}
    annotation = {**base, "either": [{"style": "video_point_count", "question": "How many cars pass?"}, {}]}
    turns = [one(annotation, seed=i) for i in range(60)]
    counted = [turn for turn in turns if turn.answer.startswith("Counting the")]
    assert 15 <= len(counted) <= 45 and {turn.user for turn in counted} == {"How many cars pass?"}
    pointed = [turn for turn in turns if turn not in counted]
    assert {turn.answer for turn in pointed} == {'<points coords="1.0 1 500 500">cars</points>'}
    assert "How many cars pass?" not in {turn.user for turn in pointed}
    both = {"style": "video_point", "turns": [annotation, {**base, "label": "dogs"}]}
    first, second = said(PromptFormatter(STAGE2, training=True), both, seeded(1))
    assert "cars" in first.answer and second.answer == '<points coords="1.0 1 500 500">dogs</points>'


def test_object_captions_name_the_object():
    turn = one({"style": "video_object_caption", "text": "It runs.", "object": "brown dog"})
    assert "brown dog" in turn.user and turn.user.startswith("video_object_caption: ") and turn.answer == "It runs."
    assert annotations.MAIN_OBJECT in one({"style": "video_object_caption", "text": "It runs."}).user
