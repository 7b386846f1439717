"""Every academic video set from its own files: tables in the published formats and videos where they are looked for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.download import Downloader
from data_prep.media import Resolver
from data_prep.sources import find_source, video_points
from data_prep.sources.base import Context, Cut, File, FirstOf, Media, Sample, convert
from data_prep.tables import Tables
from tests.support.source_rows import FILM, as_record

A5 = {f"a{i}": f"option {i}" for i in range(5)}
ASKED = {"question": "Which?", "answer": "a rabbit"}
CHOSEN = {"Question": "Which?", "Answer": "a", "NegativeAnswers": ["b"]}
POINTED = {"video_source": "youtube", "video_duration": 5.0, "label": "dogs", "question": "How many dogs?", "count": 1}
POINTED |= {"points": [[{"x": 1.0, "y": 2.0}]], "two_fps_timestamps": [1.0], "clip_start": None, "clip_end": None}
ACADEMIC = {"subset": "ovis", "video_name": "v", "dataset": None, "category": "dogs", "count": 1, "timestamps": [1.0]}
ACADEMIC |= {"points": [[{"x": 1.0, "y": 2.0}]], "video_duration": 5.0, "clip_start_time": 0.0, "clip_end_time": 4.0}
CAPTIONS = {"merged_caption": "a", "video_caption": None, "video_frame_merged_caption": "c"}
TURNS = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "a"}]
LLAVA = {"id": "1", "data_source": "0_30_s_nextqa", "video": "NextQA/1/2.mp4", "conversations": TURNS}
LLAVA_MC = [f"{d}_nextqa" for d in ("0_30_s", "30_60_s", "1_2_m", "2_3_m")] + [
    "0_30_s_perceptiontest",
    "30_60_s_perceptiontest",
]
LLAVA_OE = [f"{d}_{name}" for d in ("0_30_s", "30_60_s", "1_2_m", "2_3_m") for name in ("nextqa", "activitynetqa")]


def csv(*rows: dict[str, Any], header: bool = True) -> str:
    lines = [",".join(map(str, rows[0]))] * header + [",".join(f'"{value}"' for value in row.values()) for row in rows]
    return "".join(line + "\n" for line in lines)


# Set -> (its tables, records that come of them). A list in .json is a list of rows, in .jsonl and .parquet as well.
FILES: dict[str, tuple[dict[str, Any], int]] = {
    "molmo2_captions": ({"Molmo2-Cap/data/train-0.parquet": [{"video_id": "v", "annotation_score": 4, **CAPTIONS}]}, 1),
    "molmo2_human_qa": ({"Molmo2-AskModelAnything/data/HumanQA-0.parquet": [{"video_id": "v", **ASKED}]}, 1),
    "molmo2_syn_captions_qa": ({"Molmo2-VideoCapQA/data/CapQA-0.parquet": [{"video_id": "v", **CHOSEN}]}, 1),
    "molmo2_video_point_minmax_0_5": (
        {
            f"Molmo2-VideoPoint/{config}/train-0.parquet": [{"video_id": f"v{i}", **POINTED, "count": 1 + 8 * (i > 1)}]
            for i, config in enumerate(video_points.CONFIGS)
        },
        2,
    ),
    "academic_video_points": ({"molmo2-academic-video-points/data/train-0.parquet": [ACADEMIC]}, 1),
    "llava_video_mc_academic": ({f"{n}/{n}_mc_qa_processed.json": [{**LLAVA, "id": n}] for n in LLAVA_MC}, 6),
    "llava_video_oe_academic": ({f"{n}/{n}_oe_qa_processed.json": [{**LLAVA, "id": n}] for n in LLAVA_OE}, 8),
    "perception_test": (
        {"all_train.json": {"v": {"mc_question": [{"question": "?", "options": ["a", "b"], "answer_id": 1}], "x": 1}}},
        1,
    ),
    "nextqa_mc": (
        {
            "train.csv": csv({"video": 4010, "question": "?", "answer": 2, **A5}),
            "map_vid_vidorID.json": {"4010": "1/4010"},
        },
        1,
    ),
    "news_video_qa_filtered": ({"json_files/raw_files/new_train.json": [{"uni_clipped_id": "1x2", **ASKED}]}, 1),
    "social_iq2": (
        {
            "Social-IQ-Video/qa/train-0.parquet": [
                {"vid_name": "v", "q": "?", "answer_idx": 1, **{f"a{i}": "x" for i in range(4)}}
            ]
        },
        1,
    ),
    "sportsqa_oe": ({"meta-data/train.json": [{"video": "ball/v", **ASKED}]}, 1),
    "cinepile_with_sub": (
        {
            "Molmo2-cinepile/data/train-0.parquet": [
                {
                    "video_id": "v",
                    "subtitles": "<subtitle> a",
                    "examples": [{"question": "?", "choices": ["a", "b"], "answer_key_position": 1}],
                }
            ]
        },
        1,
    ),
    "clevrer": ({"train.json": [{"video_filename": "video_00007.mp4", "questions": [ASKED]}]}, 1),
    "funqa": (
        {
            "FunQA_train.json": [{"task": "H2", "visual_input": "H_1.mp4", "instruction": "?", "output": "a"}],
            "Funqa_mcqa_v1.json": [
                {
                    "visual_input": "H_1.mp4",
                    "instruction": "x\nThe Question is: ?\n The Options are: ['Options 1: a', 'Options 2: b']",
                    "gt": 2,
                }
            ],
        },
        1,
    ),
    "intent_qa": ({"train.csv": csv({"video_id": 9, "question": "?", "answer": 2, **A5})}, 1),
    "video_localized_narratives": (
        {
            "videoqa/text_output/oops_train/qa_text_output.json": {
                "annotations": [{"video_name": "v", "qa_pairs": [{"raw_question": "?", "raw_answer": "a"}]}]
            }
        },
        1,
    ),
    "road_text_vqa": ({"train.json": {"data": [{"video": "v.mp4", "question": "?", "answer": ["a", "b"]}]}}, 1),
    "countix_oe": (
        {
            "countix_train_mapped.csv": csv({"video_path": "train/a/v.mp4", "class": "jump", "count": 3}),
            "class_to_question.json": {"jump": ["How many jumps?"]},
        },
        1,
    ),
    "camerabench_qa": ({"camerabench_qa.parquet": [{"video_path": "v.mp4", "mc_qa_list": [CHOSEN]}]}, 1),
    "how2qa": (
        {
            "how2QA_train_release.csv": csv(
                {i: c for i, c in enumerate(["v", "[1.0:3]", *"abc", "?", "d"])}, header=False
            )
        },
        1,
    ),
    "star": (
        {"STAR_train.json": [{"video_id": "v", "start": 0, "end": 3, **ASKED, "choices": [{"choice": "a rabbit"}]}]},
        1,
    ),
    "qv_highlights": (
        {"highlight_train_release.jsonl": [{"qid": 1, "vid": "v", "query": "q", "relevant_windows": [[0, 2]]}]},
        1,
    ),
    "motionbench_train": (
        {"MotionBenchCaption-train/train.jsonl": [{"video_path": "v.mp4", "motion_caption": "It moves."}]},
        1,
    ),
    "moments_in_time_qa": ({"train.csv": csv({"label": "yawning", "video_path": "yawning/v.mp4"})}, 1),
    "charades_sta_all_qa": ({"charades_sta_train.txt": "AA 0.0 3.0##yawn.\nAA 1.0 3.0##sit.\n"}, 2),
    "youcook2_all_qa": (
        {
            "youcookii_annotations_trainval.json": {
                "database": {"v": {"subset": "training", "annotations": [{"segment": [1, 3], "sentence": "cut"}]}}
            }
        },
        2,
    ),
    "activitynet_all_qa": (
        {
            "activity_net.v1-3.min.json": {"database": {"v": {"annotations": [{"segment": [1, 3], "label": "x"}]}}},
            "train_q.json": [{"video_name": "v", "question": "is it", "question_id": "q1"}],
            "train_a.json": [{"answer": "yes", "question_id": "q1"}],
        },
        2,
    ),
    "ego4d_all": (
        {
            "ego4d_cached_train_metadata.parquet": [
                {"clip": "u_1.0_3.0_custom_clip.mp4", "corrupt": False, "message_list": [{**ASKED, "style": "ego4d_x"}]}
            ]
        },
        1,
    ),
    "epic_kitchens_qa": (
        {
            "epic-kitchens-100-annotations/EPIC_100_train.csv": csv(
                {
                    "participant_id": "P01",
                    "video_id": "P01_01",
                    "start_timestamp": "00:00:01.00",
                    "stop_timestamp": "00:00:03.00",
                    "narration": "open",
                }
            )
        },
        1,
    ),
}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


def lay(media: Media | None, folder: Path) -> None:
    """Put the film where a medium is looked for last."""
    while isinstance(media, (FirstOf, Cut)):
        media = media.media[-1] if isinstance(media, FirstOf) else media.video
    assert isinstance(media, File)
    path = folder / (media.paths[-1] + ("" if media.paths[-1].endswith(".mp4") else ".mp4"))
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FILM, path)


@pytest.mark.parametrize("name", FILES)
def test_from_files(name, tmp_path):
    tables, count = FILES[name]
    for path, content in tables.items():
        write(tmp_path / path, content)
    source, reader = find_source(name), Tables((tmp_path,))
    reader.check(source)
    ctx = Context(name, tables=reader.rows, scratch=tmp_path)
    made = list(convert(source, reader.rows(source.origin, source.fields), ctx))
    samples = [item for item in made if isinstance(item, Sample)]
    assert len(samples) == count, made
    resolver = Resolver((tmp_path,), tmp_path / "cache", Downloader(tmp_path / "cache"))
    for sample in samples:
        as_record(sample)
        lay(sample.video, tmp_path)
        video = resolver.video(sample.video)
        start, end = video.part or sample.clip or (0.0, 5.0)
        assert 0 <= start < end <= video.duration + 0.5
