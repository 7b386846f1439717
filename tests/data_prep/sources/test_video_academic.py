"""Rows of the academic sets of questions about videos, in their published schema -> samples."""

import pytest

from data_prep.sources import find_source
from data_prep.sources.base import Cut, File, FirstOf, Frames
from tests.support.source_rows import conversations, only, prepare, reasons

FIVE = {"a0": "a cat", "a1": "a fox", "a2": "a rabbit", "a3": "a dog", "a4": "a bird"}
OPTIONS = list(FIVE.values())
CHOICE = {
    "style": "video_multiple_choice",
    "question": "Which animal?",
    "options": OPTIONS,
    "answer_idx": 2,
}
OPEN = {"style": "video_short_answer", "question": "Which animal?", "answer": "a rabbit"}


def test_tgif():
    options = {f"a{i}": f"step {i}" for i in range(1, 6)}
    tables = [
        {
            "gif_name": "g1",
            "question": "What 3 times?",
            "answer": "2",
            **options,
            "__table__": "Train_action_question.csv",
        },
        {"gif_name": "g1", "question": "How often?", "answer": 3.0, "__table__": "Train_count_question.csv"},
        {"gif_name": "g2", "question": "Then?", "answer": 4, **options, "__table__": "Train_transition_question.csv"},
        {"gif_name": "g2", "question": "Who?", "answer": "man", "__table__": "Train_frameqa_question.csv"},
        {"gif_name": "g3", "question": "Then?", "answer": 5, **options, "__table__": "Train_transition_question.csv"},
    ]
    samples, skips = prepare("tgif", tables)
    assert [(s.key, s.video) for s in samples] == [("g1", File("videos/g1")), ("g2", File("videos/g2"))]
    assert [a.get("answer", a.get("answer_idx")) for a in samples[0].annotations] == [2, "step 3", "3"]
    assert [a["style"].removeprefix("video_") for a in samples[1].annotations] == [
        "multiple_choice",
        "short_answer",
        "short_answer",
    ]
    assert reasons(skips) == {"g3#0": "answer is none of the options"}
    assert find_source("tgif").origin.tables[0].delimiter == "\t"


def test_llava():
    mc = {
        "id": "1",
        "data_source": "0_30_s_nextqa",
        "video": "NextQA/1164/3238.mp4",
        "conversations": [
            {"from": "human", "value": "<image>\nWhich animal?\nA. cat\nB. rabbit\nAnswer with the letter."},
            {"from": "gpt", "value": " B. rabbit "},
        ],
    }
    other = {
        **mc,
        "conversations": [*mc["conversations"], {"from": "human", "value": "Why?"}, {"from": "gpt", "value": " "}],
    }
    samples, skips = prepare("llava_video_mc_academic", [mc, other, {**mc, "id": "2"}])
    assert [len(s.annotations) for s in samples] == [2, 1]
    assert samples[1].video == File("0_30_s_nextqa/NextQA/1164/3238.mp4")
    question, answer = "Which animal?\nA. cat\nB. rabbit\nAnswer with the letter.", "B. rabbit"
    assert only(conversations(samples[1])) == [(question, answer)]  # its own layout, no prefix
    assert list(reasons(skips).values()) == ["empty answer"]
    sample = only(prepare("llava_video_oe_academic", [mc])[0])
    assert sample.annotations[0]["style"] == "video_short_answer"
    assert only(only(conversations(sample)))[0].startswith("video_short_answer: ")
    paths = [table.path for table in find_source("llava_video_oe_academic").origin.tables]
    assert "1_2_m_nextqa/1_2_m_nextqa_oe_qa_processed.json" in paths and len(paths) == 8


def test_perception_test():
    rows = [
        {
            "video_id": "video_1",
            "mc_question": [
                {"id": 0, "question": "Which animal?", "options": OPTIONS[:3], "answer_id": 2, "tag": []},
                {"id": 1, "question": "Where?", "options": OPTIONS[:3], "answer_id": 3},
            ],
        },
        {"video_id": "video_2", "mc_question": []},
    ]
    samples, skips = prepare("perception_test", rows)
    assert [dict(a) for a in only(samples).annotations] == [{**CHOICE, "options": OPTIONS[:3]}]
    assert reasons(skips) == {"video_1#0.1": "answer is none of the options"}


def test_nextqa():
    rows = [{"video": "4010", "question": "Which animal?", "answer": "2", "type": "DO", **FIVE}] * 2
    files = {"map_vid_vidorID.json": [{"video": "4010", "value": "1164/4010"}]}
    sample = only(prepare("nextqa_mc", rows, tables=files)[0])
    assert sample.annotations == [CHOICE, CHOICE] and sample.video.paths[0] == "NExTVideo-all-videos/1164/4010"


def test_news():
    row = {"uni_clipped_id": "12x3", "question": "Which animal?", "answer": "a rabbit"}
    rows = [row, {**row, "answer": " "}, {**row, "uni_clipped_id": "76x16"}]
    samples, skips = prepare("news_video_qa_filtered", rows)
    assert only(samples).annotations == [OPEN] and samples[0].video.paths[0] == "videos/train/12x3"
    assert reasons(skips) == {"12x3#1.0": "empty answer", "76x16#0": "video known to be corrupt"}


def test_traffic():
    row = {"vid_filename": "b_1.mp4", "q_body": "Which animal?", "answer": 3}
    row |= {"option0": "a cat", "option1": "", "option2": "", "option3": "a rabbit"}
    samples, skips = prepare("sutd_trafficqa", [row, {**row, "answer": 1}])
    assert samples[0].annotations == [{**CHOICE, "options": ["a cat", "a rabbit"], "answer_idx": 1}]
    assert reasons(skips) == {"b_1.mp4#1": "answer is none of the options"}


def test_social():
    row = {"vid_name": "x", "q": "Which animal?", "answer_idx": 2, **{f"a{i}": OPTIONS[i] for i in range(4)}}
    samples, skips = prepare("social_iq2", [row, {**row, "answer_idx": 4}])
    assert only(samples).annotations == [{**CHOICE, "options": OPTIONS[:4]}] and len(skips) == 1


@pytest.mark.parametrize(
    "name, row, path",
    [
        (
            "sportsqa_oe",
            {"video": "basketball/v_1", "question": "Which animal?", "answer": "a rabbit"},
            "basketball/v_1",
        ),
        ("road_text_vqa", {"video": "7.mp4", "question": "Which animal?", "answer": ["a rabbit"]}, "videos/7.mp4"),
    ],
)
def test_open_questions(name, row, path):
    sample = only(prepare(name, [row])[0])
    assert sample.annotations == [OPEN] and sample.video.paths[0] == path
    question, answer = only(only(conversations(sample)))
    assert question.startswith("video_short_answer: ") and "Which animal?" in question and answer == "a rabbit"


def test_one_of_several_answers_is_drawn_once():
    rows = [{"video": f"{i}.mp4", "question": "?", "answer": ["yes", "", "si"]} for i in range(20)]
    samples, _ = prepare("road_text_vqa", rows)
    assert {s.annotations[0]["answer"] for s in samples} == {"yes", "si"}
    assert reasons(prepare("road_text_vqa", [{**rows[0], "answer": []}])[1]) == {"0.mp4#0": "empty answer"}


def test_cinepile():
    example = {"question": "Which animal?", "choices": OPTIONS, "answer_key_position": 2, "answer_key": "a rabbit"}
    row = {
        "video_id": "Y1",
        "movie_name": "M",
        "subtitles": "<subtitle> Hello. \n<subtitle> A yawn.",
        "examples": [example],
    }
    with_words, without = prepare("cinepile_with_sub", [row, {**row, "subtitles": None}])[0]
    assert with_words.subtitles == "Hello. \nA yawn." and without.subtitles == "" and without.key == "Y1~2"
    assert with_words.annotations == [{**CHOICE, "style": "video_multiple_choice_w_subtitle"}]
    assert without.annotations == [CHOICE] and with_words.video.paths[0] == "videos/Y1/Y1"
    assert len(conversations(with_words)) == 1
    bad = {**row, "examples": [{**example, "answer_key_position": 5}]}
    assert not prepare("cinepile_with_sub", [bad])[0]


def test_clevrer():
    def options(*right):
        return [
            {"choice_id": i, "choice": o, "answer": "correct" if i in right else "wrong"} for i, o in enumerate(OPTIONS)
        ]

    questions = [
        {"question_id": 0, "question": "Which animal?", "question_type": "descriptive", "answer": "a rabbit"},
        {"question_id": 1, "question": "Which animal?", "choices": options(2)},
        {"question_id": 2, "question": "Which are animals?", "choices": options(1, 2)},
        {"question_id": 3, "question": "Which are stones?", "choices": options()},
    ]
    samples, skips = prepare("clevrer", [{"video_filename": "video_01234.mp4", "questions": questions}])
    assert only(samples).annotations == [OPEN, CHOICE]
    assert samples[0].video.paths[0] == "video_01000-02000/video_01234.mp4"
    assert reasons(skips) == {
        "video_01234.mp4#0.2": "several options are right",
        "video_01234.mp4#0.3": "answer is none of the options",
    }


def test_funqa():
    choices = {f"Options {i}: {o}" for i, o in enumerate(OPTIONS, 1)}
    text = "Intro\nThe Question is: Which animal?\n The Options are: " + repr(sorted(choices))
    rows = [
        {"task": "H2", "visual_input": "H_A_1.mp4", "instruction": "Which animal?", "output": "a rabbit", "ID": "1"},
        {"task": "H1", "visual_input": "H_A_1.mp4", "instruction": "When?", "output": "[0, 80]"},
        {"visual_input": "H_A_1.mp4", "instruction": text, "gt": "3"},
        {"visual_input": "H_A_1.mp4", "instruction": text, "gt": "6"},
        {"visual_input": "H_A_1.mp4", "instruction": text, "gt": "0"},
        {"visual_input": "H_A_1.mp4", "instruction": "a\nb\n__import__('os')", "gt": 1},
        {"visual_input": "X_1.mp4", "instruction": text, "gt": "3"},
    ]
    samples, skips = prepare("funqa", rows)
    assert only(samples).annotations == [OPEN, CHOICE]
    assert samples[0].video == File("train/train_humor/H_A_1.mp4", "train_humor/H_A_1.mp4")
    assert reasons(skips) == {
        "H_A_1.mp4#1": "task of times or scores",
        "H_A_1.mp4#3.0": "answer is none of the options",
        "H_A_1.mp4#4": "answer is none of the options",
        "H_A_1.mp4#5": "options cannot be read",
        "X_1.mp4#0": "neither humor, creative nor magic",
    }


def test_intent():
    row = {"video_id": "9", "question": "Which animal?", "answer": "2", "qid": "0", "type": "CW", **FIVE}
    samples, skips = prepare("intent_qa", [row, {**row, "answer": "5"}])
    assert only(samples).annotations == [OPEN, CHOICE] and samples[0].video == File("videos/9")
    assert reasons(skips) == {"9#1": "answer is none of the options"}


def test_narratives():
    pairs = [{"raw_question": "Which animal?", "raw_answer": "a rabbit", "question_id": "1"}]
    sample = only(prepare("video_localized_narratives", [{"video_name": "train/x y", "qa_pairs": pairs}])[0])
    assert sample.annotations == [OPEN] and sample.video.paths[0] == "oops_video/train/x y"


def test_countix():
    questions = {"class_to_question.json": [{"class": "jumping", "value": ["How many jumps?", "Count the jumps."]}]}
    rows = [{"video_path": "train/jumping/a.mp4", "class": "jumping", "count": "4"} for _ in range(12)]
    samples, skips = prepare("countix_oe", [*rows, {**rows[0], "class": "flying"}], tables=questions)
    assert len(samples) == 12 and {a["answer"] for s in samples for a in s.annotations} == {"4"}
    assert {a["question"] for s in samples for a in s.annotations} == {"How many jumps?", "Count the jumps."}
    assert samples[0].video.paths[0] == "kinetics700/train/jumping/a.mp4"
    assert set(reasons(skips).values()) == {"no question for the class"}


def test_camera():
    asked = {
        "Question": "How does the camera move?",
        "Answer": "It pans.",
        "NegativeAnswers": ["It tilts.", "It rests."],
    }
    sample = only(prepare("camerabench_qa", [{"video_path": "a.mp4", "mc_qa_list": [asked, asked]}])[0])
    assert [a["options"][a["answer_idx"]] for a in sample.annotations] == ["It pans.", "It pans."]
    assert not prepare("camerabench_qa", [{"video_path": "a.mp4", "mc_qa_list": []}])[0]


# --- parts of videos -------------------------------------------------------------------------------------------------

TVQA = {
    "vid_name": "grey_s01e01_seg01_clip_00",
    "show_name": "Grey's Anatomy",
    "ts": "1.0-4.0",
    "q": "Which animal?",
    "answer_idx": 2,
    "qid": 1,
    **FIVE,
}
SAID = [
    {"start": 0.0, "end": 0.9, "text": "too early"},
    {"start": 0.5, "end": 2.0, "text": "Hello."},
    {"start": "3.5", "end": "9.0", "text": "A yawn."},
    {"start": 4.0, "end": 5.0, "text": "too late"},
    {"start": None, "end": 2.0, "text": "no time"},
]
TVQA_TABLES = {"tvqa_preprocessed_subtitles.jsonl": [{"vid_name": TVQA["vid_name"], "sub": SAID}]}


def test_tvqa():
    rows = [TVQA, {**TVQA, "vid_name": "silent"}, TVQA]
    heard, silent = prepare("tvqa_with_sub", rows, tables=TVQA_TABLES)[0]
    assert heard.subtitles == [(0.0, 1.0, "Hello."), (2.5, 3.0, "A yawn.")] and not silent.subtitles
    assert heard.annotations == [{**CHOICE, "style": "video_multiple_choice_w_subtitle"}] * 2
    assert silent.annotations == [CHOICE] and heard.clip is None
    assert heard.video == FirstOf(
        File(
            "frames_hq/grey_frames/grey_s01e01_seg01_clip_00/video_00004_00012",
            "video-frames/frames_hq/grey_frames/grey_s01e01_seg01_clip_00/video_00004_00012",
        ),
        Frames("frames_hq/grey_frames/grey_s01e01_seg01_clip_00", 3, 3, 11),
    )


def test_tvqa_left_out():
    rows = [
        {**TVQA, "ts": "nan-nan"},
        {**TVQA, "ts": "4.0-4.1"},
        {**TVQA, "show_name": "Dallas"},
        {**TVQA, "vid_name": "castle_s08e08_seg02_clip_14", "show_name": "Castle", "ts": "0.0-6.5"},
    ]
    samples, skips = prepare("tvqa_with_sub", rows, tables=TVQA_TABLES)
    assert not samples
    assert list(reasons(skips).values()) == [
        "clip ends before it starts",
        "clip ends before it starts",
        "unknown show",
        "video known to be corrupt",
    ]


def test_paxion():
    ssv2 = {"rel_vid_path": "20/7.webm", "label": "Opening a box", "label_action_antonym_clip_text": "Closing a box"}
    ego = {"video_uid": "u1", "clip_start": 1.0, "clip_end": 2.5, "clip_text": "#C C opens a box"}
    ego["action_antonym_clip_text"] = "#C C closes a box"
    rows = [ssv2, ego, {**ego, "clip_end": 1.0}, {**ego, "video_uid": "703d550a-0a84-4bcf-9b45-e25c864ade70"}, {"x": 1}]
    rows += [{**ssv2, "rel_vid_path": f"{i}.webm"} for i in range(30)]
    samples, skips = prepare("paxion", rows)
    first, second = samples[:2]
    assert first.video == File("sth-sth-v2/videos/20/7.webm") and first.key == "ssv2/20/7.webm"
    right = [s.annotations[0]["options"][s.annotations[0]["answer_idx"]] for s in samples]
    assert right == ["Opening a box", "C opens a box", *["Opening a box"] * 30]
    assert set(second.annotations[0]["options"]) == {"C opens a box", "C closes a box", "Not sure"}
    assert len({tuple(s.annotations[0]["options"]) for s in samples}) > 3
    whole = File("Ego4d/ego4d_data/v2/full_scale/u1", "v2/full_scale/u1", "full_scale/u1")
    assert second.video == FirstOf(File("paxion-ego4d-clips/u1_1.000_2.500"), Cut(whole, 1.0, 2.5))
    assert sorted(reasons(skips).values()) == [
        "clip ends before it starts",
        "neither Something-Something nor Ego4D",
        "video known to be corrupt",
    ]


def test_how2qa():
    row = {"video": "v_1", "span": "[2.0:3.499]", "wrong1": "a cat", "wrong2": "a fox", "wrong3": "a dog"}
    row |= {"question": "Which animal?", "answer": "a rabbit"}
    rows = [row, {**row, "span": "[3:2]"}, {**row, "video": "Z1NEMNKgR9U"}]
    samples, skips = prepare("how2qa", [*rows, {**row, "video": "onGTfd-EKrs", "span": "[89.15:89.44]"}])
    sample = only(samples)
    annotation = only(sample.annotations)
    assert annotation["options"][annotation["answer_idx"]] == "a rabbit" and len(annotation["options"]) == 4
    assert sample.video == FirstOf(File("video-clips/v_1_2.0_3.5"), Cut(File("videos/v_1"), 2.0, 3.5))
    whole = only(prepare("how2qa", [{**row, "span": "[0:5.204]"}])[0])  # the published code reads whole numbers as such
    assert whole.video.media[0] == File("video-clips/v_1_0.0_5.2", "video-clips/v_1_0_5.2")
    assert sorted(reasons(skips).values()) == ["clip ends before it starts", *["video known to be corrupt"] * 2]


def test_star():
    choices = [{"choice_id": i, "choice": option} for i, option in enumerate(OPTIONS[:4])]
    row = {"video_id": "6H78U", "start": 0.5, "end": 3.0, "question": "Which animal?", "answer": "a rabbit"}
    rows = [{**row, "choices": choices, "question_id": f"q{i}"} for i in range(6)]
    rows.append({**rows[0], "start": 1.0, "answer": "a horse"})
    samples, skips = prepare("star", rows)
    assert [(s.key, len(s.annotations), s.clip) for s in samples] == [
        ("6H78U_0.5_3.0/0", 6, (0.5, 3.0)),
        ("6H78U_0.5_3.0/1", 6, (0.5, 3.0)),
        ("6H78U_1.0_3.0", 1, (1.0, 3.0)),
    ]
    assert samples[0].annotations[:2] == [OPEN, {**CHOICE, "options": OPTIONS[:4]}]
    assert reasons(skips) == {"6H78U_1.0_3.0#0.1": "answer is none of the options"}
    assert len(conversations(samples[0])) == 6


def test_highlights():
    row = {
        "qid": 8,
        "vid": "abc_60_210",
        "query": "A rabbit yawns.",
        "duration": 150,
        "relevant_windows": [[0, 4], [6, 8]],
    }
    rows = [row, {**row, "qid": 9, "relevant_windows": [[i, i + 1] for i in range(6)]}, {**row, "relevant_windows": []}]
    samples, skips = prepare("qv_highlights", rows)
    annotation = only(only(samples).annotations)
    assert samples[0].key == "8_abc_60_210" and annotation["answer"] == "Segments: [0-4], [6-8]"
    assert "A rabbit yawns." in annotation["question"] and annotation["style"] == "video_short_answer"
    assert sorted(reasons(skips).values()) == ["more than 5 windows", "no window"]
