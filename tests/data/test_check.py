"""What prepare calls good, training uses, and the other way round: thousands of mutated records, by building them."""

import copy
import json

import numpy as np
import pytest

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.check import View, check_record
from molmo2_nemo.data.config import DataConfig, ImageConfig, TextFormatConfig, VideoConfig
from molmo2_nemo.data.json_values import FieldError
from molmo2_nemo.data.meant import check_meant, check_names
from molmo2_nemo.data.places import Placing, check_places, place_clip
from molmo2_nemo.data.record import BadRecord, parse_record
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from tests.support.films import film
from tests.support.source_rows import STAGE1, png

SIZE, SECONDS, FPS, FRAME = (24, 18), 5.0, 2, (64, 48)
PICTURE_BYTES, FILM = png(*SIZE), film(int(SECONDS * FPS), fps=FPS, size=FRAME, bframes=0)
DRAWS = 4  # builds of each record with each stage's settings
MUTANTS = 3000

TRACK = {"time": 0.5, "points": {"1": {"point": [10, 20]}, "2": {"point": [30, 5], "occluded": True}}}
QA = {"style": "user_qa", "question": "What is it?", "answer": "a cat"}
CHOICE = {"style": "a_okvqa_mc", "question": "Which?", "options": ["dog", "cat", "cow"], "answer_idx": 1}
CAPTION = {"style": "long_caption", "text": "A cat."}
PICTURE = [
    QA,
    {"style": "vqa2", "question": "Which?", "answers": ["cat", "cat", "dog", "dog", "cow"]},
    {"style": "cosyn_chart_exp", "question": "Which?", "answer": "3", "explanation": "It is so."},
    {"style": "user_qa", "question": "Where?", "answer": "<|POINT|>",
     "answer_annotations": [{"points": [[50, 50]], "inline_text": "here"}]},
    CHOICE,
    {**CHOICE, "shuffle_options": True},
    CAPTION,
    {"style": "pointing", "label": "ears", "points": [[10, 20], [30, 40]], "point_scale": 100},
    {"style": "pointing", "label": "ears", "points": [[1, 2]], "either": [{"style": "point_count"}, {"question": "Q"}]},
    {"style": "text_sft", "messages": ["q", "a", "q", "a"]},
    {"style": "user_qa", "turns": [CAPTION, {**QA, "either": [{"answer": "a dog"}, {"question": "And?"}]}, CHOICE]},
]  # fmt: skip
PICTURES = [QA, {"style": "multi_image_pointing", "label": "ears", "points": [[[1, 2]], []]}]
VIDEO = [
    {**QA, "style": "video_short_answer"},
    {"style": "video_clip_caption_start_end", "text": "A cat.", "start": 0, "end": 1.5},
    {"style": "video_point", "label": "ears", "timestamps": [0.5, 1.0], "points": [[[1, 2]], []], "point_scale": 100},
    {"style": "video_point_track_per_frame", "label": "cats", "points": [TRACK], "width": 64, "height": 48},
    {"style": "video_single_point_track_per_frame", "label": "a cat", "points": [TRACK, {**TRACK, "time": 1.0}]},
]
GOOD = [
    *({"images": ["0.png"], "annotations": [entry]} for entry in PICTURE),
    {"images": ["0.png"], "annotations": PICTURE[:6]},
    {"images": ["0.png"], "variants": [[QA], PICTURE[4:7]], "variant_weights": [1, 2]},
    {"images": ["0.png", "1.png"], "annotations": PICTURES},
    *({"video": "mp4", "annotations": [entry]} for entry in VIDEO),
    {"video": "mp4", "annotations": VIDEO, "sampling": {"max_fps": 1}, "clip": [1, 3], "subtitles": "All of it."},
    {"annotations": [QA, {"style": "text_sft", "messages": ["q", "a"]}], "weight_factor": 0.5},
]
VALUES = [
    "",
    " ",
    None,
    0,
    -1,
    1,
    2.5,
    1e9,
    True,
    [],
    {},
    "x",
    "own:mine",
    "pointing",
    "user_qa",
    "\ud800",
    [[1, 2]],
    ["a", ""],
]
NAMES = [
    "answer",
    "question",
    "text",
    "label",
    "options",
    "points",
    "messages",
    "either",
    "turns",
    "style",
    "weight",
    "anwser",
]


def mutated(rng):
    """A good record with one or two changes anywhere in it: a value replaced, a field or an entry dropped, doubled
    or renamed, many options."""
    data = copy.deepcopy(GOOD[rng.integers(len(GOOD))])
    for _ in range(rng.integers(1, 3)):
        places = list(walk({name: data[name] for name in data if name not in ("images", "video")}))
        if not places:
            break
        holder, name = places[rng.integers(len(places))]
        holder = data if name in data and holder.get(name, holder) is data.get(name) else holder
        change = rng.integers(6)
        if change < 2:
            alike = [value for value in VALUES if type(value) is type(holder[name]) or rng.random() < 0.2]
            holder[name] = copy.deepcopy(alike[rng.integers(len(alike))]) if alike else None
        elif change == 2:
            del holder[name]
        elif change == 3 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[name]))
        elif change == 3:
            holder[NAMES[rng.integers(len(NAMES))]] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        elif change == 4 and isinstance(holder, dict):
            holder[NAMES[rng.integers(len(NAMES))]] = holder.pop(name)
        elif isinstance(holder[name], list) and holder[name] and len(holder[name]) < 30:
            holder[name] = holder[name] * 14
    return data


def walk(value):
    """(holder, name or index) of everything inside."""
    names = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield value, name
        yield from walk(value[name])


def members(data):
    media = dict.fromkeys(data.get("images", ()), PICTURE_BYTES) | ({"mp4": FILM} if "video" in data else {})
    return {**media, "json": json.dumps(data).encode()}


def view(data):
    if "video" in data:
        clip = data.get("clip") or [0, SECONDS]
        return View((), FRAME, min(clip[1], SECONDS) - clip[0], FPS)
    return View((SIZE,) * len(data.get("images", ())))


@pytest.fixture(scope="module")
def builders():
    tokenizer = Molmo2Tokenizer.load("tiny")
    image, video = ImageConfig(crop_size=126, margin=2, max_crops=1), VideoConfig(max_frames=4)
    return [
        ExampleBuilder(DataConfig(image=image, video=video, text=t), tokenizer) for t in (TextFormatConfig(), STAGE1)
    ]


def usable_by_building(builder, record, seed):
    """Whether training builds the record at this access, with something to learn."""
    try:
        planned = builder.plan(record, np.random.default_rng(seed))
    except Exception:  # as the loader does
        return False
    weights = planned.loss_weights
    return bool(np.isfinite(weights).all() and (weights > 0).any())


def verdict(record, data, config=None):
    """ "good", "unusable" (what training refuses), or "not meant"."""
    try:
        check_record(record, view(data), config)
    except BadRecord:
        return "unusable"
    try:
        check_meant(record, data)
    except BadRecord:
        return "not meant"
    return "good"


def test_what_is_called_good_is_trained_and_the_other_way_round(builders):
    """Oracle: the training builder itself, at several accesses, with the settings of the first and of later stages."""
    rng = np.random.default_rng(14)
    counts = {"unread": 0, "unusable": 0, "not meant": 0, "good": 0}
    for number in range(MUTANTS):
        data = mutated(rng)
        try:
            record = parse_record("s:k", members(data))
        except BadRecord as error:
            assert error.detail
            counts["unread"] += 1
            continue
        data = json.loads(members(data)["json"], object_hook=lambda o: {k: v for k, v in o.items() if v is not None})
        said = verdict(record, data, builders[0].config)
        counts[said] += 1
        builder = builders[number % 2]
        draws = range(60 if said == "unusable" else DRAWS)
        built = (usable_by_building(builder, record, seed) for seed in draws)
        assert all(built) is (said != "unusable"), json.dumps(data)
    assert min(counts.values()) > MUTANTS // 50, counts


def placed(data, config):
    """The JSON of a good record as prepare stores it, and its own view; None where a point or a time is refused."""
    clip = tuple(data["clip"]) if "clip" in data else None
    try:
        clip = clip and place_clip(clip, SECONDS)
        whole = data | ({"clip": list(clip)} if clip else {})
        start = clip[0] if clip else 0.0
        return (
            Placing(view(whole), data.get("sampling", {}), start=start, video=config).record(whole),
            view(whole),
            clip,
        )
    except FieldError as error:
        assert error.fault.field and error.fault.seen and error.fault.expected, data
        return None


def test_what_is_placed_is_good_and_stays_as_it_is(builders):
    """Whatever a good record holds beside points and times, placing them refuses a field or gives a good record, which
    the check of stored records takes and training builds; a stored record that is refused is refused in a line, too."""
    rng, config = np.random.default_rng(15), builders[0].config
    counts = {"placed": 0, "refused": 0, "stored refused": 0}
    for number in range(MUTANTS):
        data = mutated(rng)
        try:
            record = parse_record("s:k", members(data))
            data = json.loads(
                members(data)["json"], object_hook=lambda o: {k: v for k, v in o.items() if v is not None}
            )
            check_meant(record, data)
            check_record(record, view(data), config)
        except BadRecord:
            continue
        made = placed(data, config.video)
        counts["refused" if made is None else "placed"] += 1
        if made is not None:
            stored = parse_record("s:k", members(made[0]))
            check_meant(stored, made[0])
            check_record(stored, made[1], config)
            check_places(made[0], made[1], made[2], SECONDS, config.video)
            assert usable_by_building(builders[number % 2], stored, number), json.dumps(made[0])
        try:
            check_places(data, view(data), record.clip, SECONDS, config.video)
        except FieldError as error:
            counts["stored refused"] += 1
            assert error.fault.field and error.fault.expected
    assert min(counts.values()) > MUTANTS // 100, counts


def test_good_records_are_good(builders):
    for data in GOOD:
        record = parse_record("s:k", members(data))
        assert verdict(record, data) == "good", data
        assert all(usable_by_building(builder, record, seed) for builder in builders for seed in range(DRAWS))


UNUSABLE = [
    ([{**QA, "answer": " "}], "annotations[0]"),
    ([QA, {**QA, "either": [{"answer": "a"}, {"answer": ""}]}], "annotations[1].either[1]"),
    ([{"style": "user_qa", "turns": [QA, {**QA, "answer": ""}]}], "annotations[0].turns[1]"),
    ([{**QA, "answers": ["a", "", "b"]}], "annotations[0]"),
    ([{**CHOICE, "options": [str(i) for i in range(27)]}], "annotations[0]"),
    ([{"style": "video_single_point_track_per_frame", "label": "x", "width": 9, "height": 9,
       "points": [{"time": 0, "points": {"1": {"point": [1, 1], "occluded": True}}}]}], "annotations[0]"),
    ([{**QA, "answer": "\ud800"}], "annotations[0]"),
]  # fmt: skip


@pytest.mark.parametrize("tree, field", UNUSABLE)
def test_what_training_refuses_is_named(tree, field):
    record = parse_record("s:k", {"json": json.dumps({"annotations": tree}).encode()})
    with pytest.raises(BadRecord) as caught:
        check_record(record, View())
    assert caught.value.fault.field == field and caught.value.fault.expected
    variants = parse_record("s:k", {"json": json.dumps({"variants": [[QA], tree]}).encode()})
    with pytest.raises(BadRecord) as caught:
        check_record(variants, View())
    assert caught.value.fault.field == field.replace("annotations", "variants[1]")


def test_limits_and_weights():
    for more in ({"weight": 0}, {"weight_factor": 1e-60}, {"annotations": [QA] * 4097}):
        with pytest.raises(BadRecord) as caught:
            check_record(parse_record("s:k", {"json": json.dumps({"annotations": [QA], **more}).encode()}), View())
        assert caught.value.fault.field == next(iter(more))


NOT_MEANT = [
    ({"annotations": [{**QA, "anwser": "b"}]}, "annotations[0].anwser", "did you mean 'answer'?"),
    (
        {
            "images": ["0.png"],
            "annotations": [QA, {"style": "pointing", "label": "x", "points": [], "pointscale": 100}],
        },
        "annotations[1].pointscale",
        "did you mean 'point_scale'?",
    ),
    ({"annotations": [{**QA, "either": [{"quesion": "b"}]}]}, "annotations[0].either[0].quesion", "'question'"),
    ({"annotations": [{"style": "user_qa", "turns": [{**QA, "prompt": "b"}]}]}, "annotations[0].turns[0].prompt", ""),
    ({"annotations": [QA], "sampling": {"fps": 1}}, "sampling.fps", "did you mean 'max_fps'?"),
    ({"annotations": [QA], "video": "mp4", "sampling": {"max_frames": "8"}}, "sampling.max_frames", "above 0"),
    ({"annotations": [{**CAPTION, "style": "long_captoin"}]}, "annotations[0].style", "did you mean 'long_caption'?"),
    (
        {"annotations": [{"style": "user_qa", "turns": [{**QA, "style": "pointng"}]}]},
        "annotations[0].turns[0].style",
        "",
    ),
    ({"annotations": [QA], "video": "mp4", "subtitles": "film.srt"}, "subtitles", "list of {start, end, text}"),
    (
        {"annotations": [QA], "video": "mp4", "subtitles": [{"start": 0, "end": 1, "text": "x", "speaker": "y"}]},
        "subtitles[0].speaker",
        "",
    ),
    ({"annotations": [QA], "clip": [0, 1]}, "clip", "a video"),
    ({"annotations": [{**QA, "question": " "}]}, "annotations[0].question", "not blank"),
    ({"annotations": [{"style": "user_qa", "answer": "a"}]}, "annotations[0].question", "asked"),
    ({"annotations": [{**CHOICE, "options": ["a", "b ", "b"]}]}, "annotations[0].options[2]", "no other"),
    ({"annotations": [{**CHOICE, "options": ["a", "", "b"]}]}, "annotations[0].options[1]", "not blank"),
    ({"annotations": [{"style": "text_sft", "messages": ["q", ""]}]}, "annotations[0].messages[1]", "not blank"),
    ({"annotations": [{**QA, "answer": "see <|POINT|>"}]}, "annotations[0].answer", "as many"),
    ({"annotations": [{"style": "pointing", "label": "", "points": [], "point_scale": 9}]}, "annotations[0].label", ""),
    (
        {"annotations": [{"style": "pointing", "label": "x", "points": [], "point_scale": 9}]},
        "annotations[0].style",
        "image",
    ),
    ({"annotations": [{**VIDEO[1]}]}, "annotations[0].style", "a video"),
    (
        {"video": "mp4", "annotations": [{**VIDEO[3], "points": [{"time": 0, "points": {}}]}]},
        "annotations[0].points",
        "",
    ),
    ({"variants": [[QA], [{**QA, "foo": 1}]]}, "variants[1][0].foo", ""),
]


@pytest.mark.parametrize("data, field, expected", NOT_MEANT)
def test_what_nobody_can_have_meant_is_named_and_still_trained(data, field, expected):
    record = parse_record("s:k", members(data))
    with pytest.raises(BadRecord) as caught:
        check_meant(record, data)
    fault = caught.value.fault
    assert fault.field == field and expected in fault.expected and fault.seen
    if "sampling" not in field:
        check_record(record, view(data))  # shards that were written before keep loading


def test_published_records_are_asked_for_known_names_only():
    check_names("k", {"annotations": [{**QA, "style": "a_column_says_so", "question": ""}]})
    with pytest.raises(BadRecord, match="pointscale"):
        check_names("k", {"annotations": [{**QA, "pointscale": 100}]})


def test_a_style_of_ones_own_is_worded_as_before():
    own, before = (
        parse_record("s:k", {"json": json.dumps({"annotations": [{**QA, "style": style}]}).encode()}).annotations
        for style in ("own:mine", "mine")
    )
    assert own == before and own[0].content.style.name == "mine"
    data = {"annotations": [{**QA, "style": "own:mine"}]}
    check_meant(parse_record("s:k", members(data)), data)
