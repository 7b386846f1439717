"""Fields that nothing reads where they stand are named, and no others: compared with what is said in training."""

import json

import numpy as np
import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.config import TextFormatConfig, VideoConfig
from molmo2_nemo.data.json_values import FieldError
from molmo2_nemo.data.meant import FORM_FIELDS
from molmo2_nemo.data.prompts import PromptFormatter, VisualContext
from molmo2_nemo.data.unread import HARMLESS, check_read, check_sampling_read
from molmo2_nemo.data.video.sampling import TimeSampler
from tests.data.test_check import PICTURE, PICTURES, SIZE, TRACK, VIDEO
from tests.support.source_rows import STAGE1, png

VALUES = {
    **dict.fromkeys(("text", "answer", "answer_with_points", "question", "label", "explanation"), ("one", "Two")),
    **dict.fromkeys(("label_cased", "object"), ("one", "Two")),
    "answers": (["one"], ["Two"]),
    "answer_annotations": ([{"points": [[1, 2]], "inline_text": "a"}], [{"points": [[3, 4]], "inline_text": "b"}]),
    "options": (["one", "two"], ["three", "four"]),
    "answer_idx": (0, 1),
    **dict.fromkeys(("shuffle_options", "unlabelled_options"), (False, True)),
    "points": ([[1, 2]], [[3, 4], [5, 6]]),
    **dict.fromkeys(("point_scale", "width", "height"), (100, 70)),
    "timestamps": ([0.5], [1.0, 1.5]),
    "sampling_fps": (1, 2),
    "snap": (0.0, 0.2),
    **dict.fromkeys(("start", "end", "time"), (0.5, 1.5)),
}
BASES = [(entry, 1, False) for entry in PICTURE if "turns" not in entry and "either" not in entry]
BASES += [(entry, 2, False) for entry in PICTURES] + [
    (entry, 0, True) for entry in VIDEO if "track" not in entry["style"]
]
BESIDE = {**TRACK, "time": 1.6}  # no sampled time
BASES += [({**e, "points": [*e["points"], BESIDE]}, 0, True) for e in VIDEO if "track" in e["style"]]
BASES += [({"style": "video_object_caption", "text": "A cat."}, 0, True)]
BASES += [({"style": "point_count", "label": "ears", "answer": "2"}, 1, False)]
TIMES = np.array([0, 0.5, 1, 1.5, 2])


def said(fields, images, video):
    """All that training may say of an annotation, with the wordings of the first and of later stages; or the error."""
    made = []
    for config in (TextFormatConfig(), STAGE1):
        formatter = PromptFormatter(config)
        context = VisualContext((SIZE,) * images, (64, 48) if video else None, TIMES if video else np.zeros(0))
        try:
            annotation = read_annotation(dict(fields), images, video)
            for seed in range(12):
                turns = formatter.conversation(annotation, context, np.random.default_rng(seed))
                made.append([(turn.user, turn.answer) for turn in turns])
        except ValueError as error:
            made.append(str(error))
    return made


def named_unread(fields, images, video, name):
    try:
        notes = check_read(fields, "annotations[0]", images, video)
    except FieldError as error:
        return error.fault.field == f"annotations[0].{name}"
    return any(note.startswith(f"fields {name} ") for note in notes)


def test_every_field_of_every_task():
    """Oracle: the conversations. A field is unread where all its values and its absence make the same conversations."""
    assert set(VALUES) == FORM_FIELDS - {"style"}
    counts = {"read": 0, "unread": 0}
    for base, images, video in BASES:
        marks = "<|POINT|>" in str(base.get("answer", "")) or "answer" not in base
        for name in sorted(VALUES if marks else VALUES.keys() - {"answer_annotations"}):  # their number is checked
            for value in VALUES[name]:
                fields = {**base, name: value}
                try:
                    read_annotation(dict(fields), images, video)
                except FieldError:
                    continue
                without = {n: v for n, v in fields.items() if n != name}
                forms = [without, *({**base, name: other} for other in VALUES[name])]
                influences = len({json.dumps(said(form, images, video)) for form in forms}) > 1
                assert named_unread(fields, images, video, name) is not influences, fields
                counts["read" if influences else "unread"] += 1
    assert min(counts.values()) > 100, counts


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"style": "long_caption", "text": "x", "options": ["a", "b"], "answer_idx": 0}, "options"),
        ({"style": "user_qa", "question": "q", "answer": "a", "points": [[1, 2]]}, "points"),
        ({"style": "user_qa", "question": "q", "turns": [{"question": "r", "answer": "a"}]}, "question"),
        ({"style": "user_qa", "turns": [{"question": "r", "answer": "a", "time": 3}]}, "turns[0].time"),
        ({"style": "user_qa", "question": "q", "either": [{"answer": "a", "object": "b"}]}, "either[0].object"),
        ({"style": "user_qa", "question": "q", "answer": "z", "either": [{"answer": "a"}, {"answer": "b"}]}, None),
        ({"style": "user_qa", "messages": ["a", "b"], "question": "q"}, "question"),
        ({"style": "pointing", "label": "ears", "points": [[1, 2]], "width": 10}, "width"),
        ({"style": "pointing", "label": "ears", "points": [[1, 2]], "timestamps": [1]}, "timestamps"),
        ({"style": "long_caption", "text": "x", "object": "cat"}, "object"),
    ],
)
def test_the_field_is_named_wherever_it_stands(fields, path):
    if path is None:
        assert check_read(fields, "annotations[0]", 1, False) == [
            "fields answer that the style does not read where they stand"
        ]
        return
    with pytest.raises(FieldError) as caught:
        check_read(fields, "annotations[0]", 1, False)
    assert caught.value.fault.field == f"annotations[0].{path}" and "is not read by the style" in str(caught.value)
    assert caught.value.fault.seen and caught.value.fault.expected


@pytest.mark.parametrize("unit", [{"point_scale": 1e308}, {"point_scale": 2.0**53}, {"width": 1e99, "height": 1e99}])
def test_a_number_is_read_although_one_more_is_the_same(unit):
    assert (
        check_read({"style": "pointing", "label": "ears", "points": [[1, 2]], **unit}, "annotations[0]", 1, False) == []
    )


def test_keys_of_sampling():
    """Oracle: the sampler, at many durations."""
    values = {"max_fps": (1, 3), "max_frames": (3, 9), "sampling_fps": (1, 2), "candidate_sampling_fps": ([1], [5, 3])}
    modes = [{}, {"mode": "fps"}, {"frame_sample_mode": "fps"}, {"mode": "fps", "candidate_sampling_fps": [1, 2]}]
    for base in [*modes, {"mode": "uniform_last_frame"}, {"mode": "fps", "sampling_fps": 2}]:
        for name, choices in values.items():
            forms = [{n: v for n, v in base.items() if n != name}, *({**base, name: value} for value in choices)]
            grids = set()
            for form in forms:
                sampler = TimeSampler.of(VideoConfig(max_frames=30), form, 10)
                grids.add(json.dumps([sampler(seconds).tolist() for seconds in (0.3, 2, 4, 11, 40)]))
            if len(grids) > 1 and not (name == "candidate_sampling_fps" and "sampling_fps" in base):
                check_sampling_read({**base, name: choices[0]})
            else:
                with pytest.raises(FieldError, match=r"sampling\.\w+ is not read"):
                    check_sampling_read({**base, name: choices[0]})
    with pytest.raises(FieldError, match="frame_sample_mode is not read: mode says"):
        check_sampling_read({"mode": "fps", "frame_sample_mode": "fps"})


def test_prepare_names_mistakes_and_counts_the_rest(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png(24, 18))
    choice = {"style": "a_okvqa_mc", "question": "Which?", "options": ["dog", "cat"], "answer_idx": 1}
    lines = [
        {"key": "both", "image": "a.png", "annotations": [{**choice, "answer": "cat"}]},
        {"image": "a.png", "annotations": [{**choice, "style": "long_caption", "question": None, "text": "A cat."}]},
        {"image": "a.png", "annotations": [{"style": "user_qa", "question": "q", "answer": "a", "points": [[1, 2]]}]},
    ]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["prepare", str(tmp_path / "my.jsonl"), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "1  fields answer that the style does not read where they stand (the first: both)" in said
    skipped = [json.loads(line) for line in (tmp_path / "out" / "my" / "skipped.jsonl").read_text().splitlines()]
    assert [(s["line"], s["field"]) for s in skipped] == [(2, "annotations[0].options"), (3, "annotations[0].points")]
    assert not HARMLESS & {s["field"].rpartition(".")[2] for s in skipped}
