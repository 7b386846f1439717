"""Video sources from files in the published layouts -> shards -> examples of the trainer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.prepare import Options, prepare
from data_prep.sources import find_source
from molmo2_nemo.data.annotations import MultipleChoice
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.record import Record, parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from tests.support.source_rows import FILM, only, png

CONFIG = DataConfig(image=ImageConfig(crop_size=126, margin=2), video=VideoConfig(max_frames=8, max_fps=2))


def write(path: Path, content: str | list | dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def lines(path: Path, rows: list) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def film(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FILM, path)


def frames(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i + 1:05d}.png").write_bytes(png(64, 48))


def records(name: str, source: Path, tmp_path: Path) -> list[Record]:
    """The records that `molmo2 prepare NAME --source DIR` writes."""
    out = tmp_path / "out" / name
    prepare(find_source(name), out, Options(folders=(source,), cache=tmp_path / "cache"))
    dataset = ShardDataset(out, name)
    return [parse_record(*dataset.read(i)) for i in range(len(dataset))]


def conversations(record: Record) -> list[list[tuple[str, str]]]:
    example = ExampleBuilder(CONFIG, Molmo2Tokenizer.load("tiny")).build(record, np.random.default_rng(0))
    assert example.crops.shape[0] > 0
    return example.info["conversations"]


def test_subtitles_and_the_published_folders(tmp_path):
    said = [{"start": 0.2, "end": 1.8, "text": "The rabbit comes out."}]
    row = {"video_id": "-x y", "Question": "Which?", "Answer": "a", "NegativeAnswers": ["b"], "subtitle": said}
    parquet(tmp_path / "s/Molmo2-VideoSubtitleQA/data/SubtitleQA-00000-of-00001.parquet", [row, row])
    film(tmp_path / "s/youtube-cc/youtube-cc-kw/-x y/A Film [-x y].mp4")
    record = only(records("molmo2_syn_captions_subtitle_qa", tmp_path / "s", tmp_path))
    assert record.subtitles[0].text == "The rabbit comes out." and len(record.annotations) == 2
    assert len(conversations(record)) == 2


def test_tracks_of_encoded_frames(tmp_path):
    steps = [
        {"frame": 6 * i, "time": float(i), "points": [{"id": 1, "point": [8.0, 6.0], "occluded": False}]}
        for i in (0, 1)
    ]
    row = {"id": "q", "video": "v", "fps": 6, "sampling_fps": 1, "width": 64, "height": 48, "expression": "dot"}
    row |= {"mask_id": ["1"], "frame_trajectories": steps}
    parquet(tmp_path / "s/molmo2-mevis/track/train-00000-of-00001.parquet", [row])
    frames(tmp_path / "s/MeViS/MeViS_release/train/JPEGImages/v", 12)
    record = only(records("mevis_track", tmp_path / "s", tmp_path))
    assert record.sampling["candidate_sampling_fps"] == [1, 2, 3, 6]
    assert conversations(record)[0][0][1] == '<tracks coords="0.0 1 125 125;1.0 1 125 125">dot</tracks>'


def test_part_of_a_folder_of_frames_with_subtitles(tmp_path):
    row = {"vid_name": "v", "show_name": "Friends", "ts": "1.0-3.0", "q": "Who?", "answer_idx": 0, "qid": 1}
    lines(tmp_path / "s/tvqa_train.jsonl", [{**row, **{f"a{i}": f"person {i}" for i in range(5)}}])
    said = [{"start": 2.5, "end": 4.0, "text": "Hello."}]
    lines(tmp_path / "s/tvqa_preprocessed_subtitles.jsonl", [{"vid_name": "v", "sub": said}])
    frames(tmp_path / "s/frames_hq/friends_frames/v", 12)
    record = only(records("tvqa_with_sub", tmp_path / "s", tmp_path))
    assert (record.subtitles[0].start, record.subtitles[0].end) == (1.5, 2.0)
    assert record.annotations[0].content.style.name == "video_multiple_choice_w_subtitle"
    example = ExampleBuilder(CONFIG, Molmo2Tokenizer.load("tiny")).build(record, np.random.default_rng(0))
    assert example.info["duration"] == pytest.approx(2.0)


def test_part_cut_from_a_whole_video(tmp_path):
    row = {"video_uid": "u", "clip_start": 1.0, "clip_end": 3.0, "clip_text": "#C C yawns"}
    row["action_antonym_clip_text"] = "C sleeps"
    lines(tmp_path / "s/ego4d/egoclip_subset_action_antonyms_train_val_test_split/train.jsonl", [row])
    write(tmp_path / "s/ssv2/antonyms/train_with_rel_path.json", [])
    film(tmp_path / "s/Ego4d/ego4d_data/v2/full_scale/u.mp4")
    record = only(records("paxion", tmp_path / "s", tmp_path))
    assert record.clip is not None and record.clip[1] - record.clip[0] == pytest.approx(2.0, abs=0.05)
    assert len(conversations(record)) == 1


def test_a_table_of_lists(tmp_path):
    columns = ["record_id", "vid_id", "vid_filename", "perspective", "q_body", "q_type"]
    columns += [*(f"option{i}" for i in range(4)), "answer"]
    row = [1, 2, "b_1.mp4", 0, "Which?", "U", "a", "", "c", "", 2]
    lines(tmp_path / "s/R2_train.jsonl", [columns, row])
    film(tmp_path / "s/compressed_videos/b_1.mp4")
    record = only(records("sutd_trafficqa", tmp_path / "s", tmp_path))
    choice = record.annotations[0].content
    assert choice.options == ("a", "c") and choice.answer == 1


def test_tables_with_tabs(tmp_path):
    options = "\t".join(f"a{i}" for i in range(1, 6))
    write(
        tmp_path / "s/Train_action_question.csv", f"gif_name\tquestion\t{options}\tanswer\ng\tWhat?\ta\tb\tc\td\te\t1\n"
    )
    write(tmp_path / "s/Train_count_question.csv", "gif_name\tquestion\tanswer\ng\tHow often?\t3\n")
    write(tmp_path / "s/Train_transition_question.csv", f"gif_name\tquestion\t{options}\tanswer\n")
    write(tmp_path / "s/Train_frameqa_question.csv", "gif_name\tquestion\tanswer\nlost\tWho?\tman\n")
    film(tmp_path / "s/videos/g.mp4")
    record = only(records("tgif", tmp_path / "s", tmp_path))
    chosen, *said = (annotation.content for annotation in record.annotations)
    assert isinstance(chosen, MultipleChoice) and [content.answer.texts for content in said] == [("b",), ("3",)]
    skipped = [path for path in (tmp_path / "out/tgif").iterdir() if "skip" in path.name]
    assert "lost" in only(skipped).read_text(encoding="utf-8")


def test_json_objects_and_lists_of_lines(tmp_path):
    part = {"segment": [1.0, 3.0], "label": "yawn"}
    write(
        tmp_path / "s/COIN.json", {"database": {"abc": {"subset": "training", "annotation": [part], "class": "Wake"}}}
    )
    parquet(tmp_path / "s/coin_corrupt.parquet", [
        {"video_id": "z", "metadata": {"clip_start_time": 0.0, "clip_end_time": 1.0}}
    ])  # fmt: skip
    film(tmp_path / "s/videos/abc.mkv")
    record = only(records("coin_all_qa", tmp_path / "s", tmp_path))
    assert record.clip == (1.0, 3.0) and record.annotations[0].content.answer.texts == ("yawn",)
    write(tmp_path / "k/kinetics710/k710_label_map.txt", "yawning\n")
    write(tmp_path / "k/kinetics710/k700_train_list_videos.txt", "k700/train/a.mp4 0\n")
    write(tmp_path / "k/kinetics710/k600_train_list_videos.txt", "")
    parquet(tmp_path / "k/kinetics_corrupt.parquet", [{"video": "x"}])
    film(tmp_path / "k/kinetics700/train/yawning/a.mp4")
    record = only(records("kinetics_qa", tmp_path / "k", tmp_path))
    assert record.annotations[0].content.answer.texts == ("yawning",)


def test_an_arrow_file(tmp_path):
    row = {"id": "1", "video": "oops/oops_video/train/a.mp4", "captions": ["It yawns."], "actor_names": ["Rabbit"]}
    table = pa.Table.from_pylist([row])
    path = tmp_path / "s/hf_dataset/data-00000-of-00001.arrow"
    path.parent.mkdir(parents=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    film(tmp_path / "s/oops_video/train/a.mp4")  # without the folder of the collection
    record = only(records("video_localized_narratives_caption", tmp_path / "s", tmp_path))
    assert "rabbit" in conversations(record)[0][0][0]
