"""A data root of the published code works as --source: tables and media are found where its classes look."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.bringing.catalogue import load
from data_prep.bringing.needs import needs_of
from data_prep.download import Downloader
from data_prep.media import Resolver
from data_prep.official_layout import HOMES, PACKED, source_folders
from data_prep.prepare import Options, prepare
from data_prep.sources import all_sources, find_source
from data_prep.sources.base import File, Frames, Manual
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset
from tests.data_prep.sources.test_tracking import CLIP_ROW, ROW
from tests.data_prep.sources.test_video_tables import FILES, write
from tests.support.source_rows import FILM, png

V, IMAGE = "video_datasets", "torch_datasets"
TRACK = f"{V}/video_track"
# Sets with tables brought by hand -> where the published code keeps them. (Other tables come from the Hub.)
TABLES = {
    "perception_test": f"{V}/perception_test",
    "nextqa_mc": f"{V}/NeXTQA",
    "sportsqa_oe": f"{V}/SportsQA",
    "clevrer": f"{V}/CLEVRER",
    "funqa": f"{V}/FunQA",
    "intent_qa": f"{V}/IntentQA",
    "video_localized_narratives": f"{V}/video-localized-narratives",
    "road_text_vqa": f"{V}/RoadTextVQA",
    "news_video_qa_filtered": f"{V}/NewsVideoQA/final_data_feb_16",
    "countix_oe": f"{V}/Countix",
    "camerabench_qa": f"{V}/CameraBench",
    "how2qa": f"{V}/how2QA",
    "star": f"{V}/STAR",
    "qv_highlights": f"{V}/QVHighlights",
    "motionbench_train": f"{V}/MotionBench",
    "moments_in_time_qa": f"{V}/moments_in_time/Moments_in_Time_Raw",
    "charades_sta_all_qa": f"{V}/Charades",
    "youcook2_all_qa": f"{V}/youcook2",
    "activitynet_all_qa": f"{V}/ActivityNet",
    "epic_kitchens_qa": f"{V}/epic-kitchens",
    "llava_video_mc_academic": f"{V}/LLaVA-Video-178K",
    "llava_video_oe_academic": f"{V}/LLaVA-Video-178K",
    "ego4d_all": f"{V}/Ego4d",
}
LLAVA = [f"{V}/LLaVA-Video-178K/0_30_s_nextqa/NextQA/1/2.mp4"]
# Sets -> the videos that the published code opens for the rows of FILES.
MEDIA = {
    "molmo2_captions": [f"{V}/youtube_temporal/batch_1/v.mkv"],
    "molmo2_human_qa": [f"{V}/youtube-cc/youtube-cc-kw/v/A film.mp4"],
    "molmo2_syn_captions_qa": [f"{V}/youtube-cc/youtube-cc-temporal/v/A film.webm"],
    "molmo2_video_point_minmax_0_5": [f"{V}/youtube-cc/youtube-cc-exist-2fps/v{i}_2fps.mp4" for i in range(2)],
    "academic_video_points": [f"{TRACK}/OVIS/videos/v.mp4"],
    "llava_video_mc_academic": LLAVA,
    "llava_video_oe_academic": LLAVA,
    "perception_test": [f"{V}/perception_test/train_videos/v.mp4"],
    "nextqa_mc": [f"{V}/NeXTQA/NExTVideo-all-videos/1/4010.mp4"],
    "news_video_qa_filtered": [f"{V}/NewsVideoQA/final_data_feb_16/videos/train/1x2.mp4"],
    "social_iq2": [f"{V}/social-iq2/video/v.mp4"],
    "sportsqa_oe": [f"{V}/SportsQA/ball/v.mp4"],
    "cinepile_with_sub": [f"{V}/cinepile/videos/v/v.mp4"],
    "clevrer": [f"{V}/CLEVRER/video_00000-01000/video_00007.mp4"],
    "funqa": [f"{V}/FunQA/train/train_humor/H_1.mp4"],
    "intent_qa": [f"{V}/IntentQA/videos/9.mp4"],
    "video_localized_narratives": [f"{V}/oops/oops_video/v.mp4"],
    "road_text_vqa": [f"{V}/RoadTextVQA/videos/v.mp4"],
    "countix_oe": [f"{V}/kinetics/kinetics700/train/a/v.mp4"],
    "camerabench_qa": [f"{V}/CameraBench/train/v.mp4"],
    "how2qa": [f"{V}/how2QA/video-clips/v_1.0_3.mp4"],
    "star": [f"{V}/Charades/Charades_v1/v.mp4"],
    "qv_highlights": [f"{V}/QVHighlights/videos/v.mp4"],
    "motionbench_train": [f"{V}/MotionBench/MotionBenchCaption-train/videos/v.mp4"],
    "moments_in_time_qa": [f"{V}/moments_in_time/Moments_in_Time_Raw/train-videos/yawning/v.mp4"],
    "charades_sta_all_qa": [f"{V}/Charades/Charades_v1/AA.mp4"],
    "youcook2_all_qa": [f"{V}/youcook2/videos/v.webm"],
    "activitynet_all_qa": [f"{V}/ActivityNet/all-videos/v.mp4"],
    "ego4d_all": [f"{V}/ego4d-clips/u_1.0_3.0_custom_clip.mp4"],
    "epic_kitchens_qa": [f"{V}/epic-kitchens/P01/videos/P01_01.mp4"],
}


def records(name: str, root: Path, out: Path, hub: Path | None = None) -> list[Any]:
    """The records that `molmo2 prepare NAME --source ROOT` writes; `hub`: a copy of the tables of the Hub."""
    folders = (*source_folders((root,), name), *([hub] if hub else []))
    prepare(find_source(name), out / name, Options(folders=folders, cache=out / "cache"))
    dataset = ShardDataset(out / name, name)
    return [parse_record(*dataset.read(i)) for i in range(len(dataset))]


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FILM, path)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One data root with the files of all these sets, side by side."""
    folder = tmp_path_factory.mktemp("root")
    for name, (tables, _) in FILES.items():
        for path, content in tables.items():
            if name in TABLES:
                write(folder / TABLES[name] / path.removeprefix("epic-kitchens/"), content)
        for path in MEDIA[name]:
            put(folder / path)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_videos_are_found_where_the_published_code_keeps_them(name, root, tmp_path):
    tables, count = FILES[name]
    hub = None
    if name not in TABLES:
        hub = tmp_path / "hub"
        for path, content in tables.items():
            write(hub / path, content)
    assert len(records(name, root, tmp_path, hub)) == count


@pytest.mark.parametrize("part", [V, TRACK])
def test_a_main_folder_of_it_is_a_root_too(part, root):
    name, file = ("academic_video_points", "OVIS/videos/v.mp4") if part == TRACK else ("funqa", "FunQA_train.json")
    assert any((folder / file).is_file() for folder in source_folders((root / part,), name))


# --- every tracking set: the class's folder of frames or of films ----------------------------------------------------

FRAMES = {
    "mevis": "MeViS/MeViS_release/train/JPEGImages/05ce",
    "ref_yt_vos": "Ref-YT-VOS/train/JPEGImages/05ce",
    "lv_vis": "LV-VIS/train/JPEGImages/05ce",
    "vicas": "ViCaS/train/videos/05ce.mp4",
    "revos": "ReVOS/JPEGImages/05ce",
    "burst": "TAO-Amodal/train/videos/05ce.mp4",
    "ref_davis17": "Ref-DAVIS17/DAVIS/JPEGImages/480p/05ce",
    "yt_vis": "YT-VIS/train/JPEGImages/05ce",
    "moca": "MoCA/MoCA/JPEGImages/05ce",
    "webuav": "WebUAV/Train/05ce/img",
    "got10k": "GOT-10k/train/05ce",
    "vasttrack": "VastTrack/train/05ce/05ce/imgs",
    "trackingnet": "TrackingNet/TRAIN_11/frames/05ce",
    "lvosv1": "LVOSv1/train/JPEGImages/05ce",
    "lvosv2": "LVOSv2/train/JPEGImages/05ce",
    "lasot": "LaSOT/annotation/05ce/img",
    "uwcot": "UW-COT220/UW-COT220/05ce.mp4",
    "webuot": "webuot/Train/05ce.mp4",
    "latot": "LaTOT/LaTOT/05ce/img",
    "tnl2k": "TNL2K/05ce/imgs",
    "tnllt": "TNLLT/frames/05ce/imgs",
    "molmo2": "MOSE/MOSE_release/train/JPEGImages/05ce",
}
TRACKED = [name for name, source in all_sources().items() if source.mixes.get("sft") == "tracking"]


@pytest.mark.parametrize("name", TRACKED)
def test_tracks(name, tmp_path):
    source = find_source(name)
    place = tmp_path / "root" / TRACK / next(p for start, p in FRAMES.items() if name.startswith(f"{start}_"))
    if place.suffix == ".mp4":
        put(place)
    else:
        place.mkdir(parents=True)
        for i in range(60):
            (place / f"{i:05d}.png").write_bytes(png(96, 54))
    row = CLIP_ROW if name.startswith("molmo2_") else ROW
    folder = tmp_path / "hub" / source.origin.repo.split("/")[1]
    write(folder / source.origin.configs[0] / "train-0.parquet", [row])
    write(folder / "video_original_fps.json", {})
    (record,) = records(name, tmp_path / "root", tmp_path, tmp_path / "hub")
    assert record.video


# --- images ----------------------------------------------------------------------------------------------------------

ANSWERED = {"question": "Which?", "answers": ["a"], "questionId": 1}
IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "doc_qa": (
        {
            f"{IMAGE}/docqa/train_v1.0_withQT.json": {
                "data": [{**ANSWERED, "image": "documents/a.png", "data_split": "train"}]
            }
        },
        f"{IMAGE}/docqa/documents/a.png",
    ),
    "info_qa": (
        {f"{IMAGE}/info_qa/infographicsVQA_train_v1.0.json": {"data": [{**ANSWERED, "image_local_name": "a.png"}]}},
        f"{IMAGE}/info_qa/images/a.png",
    ),
    "st_qa": (
        {
            f"{IMAGE}/scene-text/train_task_3.json": {
                "data": [
                    {"question": "Which?", "answers": ["a"], "question_id": i, "file_path": "coco-text/a.png"}
                    for i in range(2000)
                ]
            }
        },
        f"{IMAGE}/scene-text/coco-text/a.png",
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_pictures(name, tmp_path):
    tables, picture = IMAGES[name]
    for path, content in tables.items():
        write(tmp_path / "root" / path, content)
    (tmp_path / "root" / picture).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "root" / picture).write_bytes(png())
    assert records(name, tmp_path / "root", tmp_path)


def test_pictures_by_path_count_from_the_folder_of_pictures(tmp_path):
    place = tmp_path / IMAGE / "images/coco/train2014"
    place.mkdir(parents=True)
    assert tmp_path / IMAGE in source_folders((tmp_path,), "okvqa") and tmp_path / IMAGE not in source_folders(
        (tmp_path,), "mine"
    )


# --- the whole table -------------------------------------------------------------------------------------------------


def test_every_set_has_its_folder():
    """Sets of the published mixtures whose tables are brought by hand are listed, or packed; of all others media count
    from the main folders. The published code knows no folder of sets that are in none of its mixtures."""
    by_hand = {name for name, source in all_sources().items() if isinstance(source.origin, Manual) and source.mixes}
    assert by_hand <= set(HOMES) | set(PACKED) and not set(HOMES) & set(PACKED)
    assert set(HOMES) | set(PACKED) <= set(all_sources())


def test_needs_see_what_is_there(root):
    needs = needs_of([find_source(name) for name in ("clevrer", "perception_test", "funqa")], load(), root)
    assert {need.state for need in needs} == {"there"}
    assert {n.state for n in needs_of([find_source("okvqa")], load(), root)} == {"missing"}


# Sets without rows here -> a file that the published code opens, and the medium that the source asks for.
ASKED: dict[str, tuple[str, File | Frames]] = {
    "tgif": (f"{V}/TGIF/videos/g.mp4", File("videos/g")),
    "sutd_trafficqa": (f"{V}/SUTD-TrafficQA/compressed_videos/a.mp4", File("compressed_videos/a.mp4")),
    "coin_all_qa": (f"{V}/coin/videos/v.webm", File("videos/v")),
    "kinetics_qa": (f"{V}/kinetics/kinetics600/train/a_b/v.mp4", File("kinetics600/train/a_b/v.mp4")),
    "tvqa_with_sub": (f"{V}/TVQA/video-frames/frames_hq/bbt_frames/v/00001.jpg", Frames("frames_hq/bbt_frames/v", 3)),
    "paxion": (f"{V}/sth-sth-v2/videos/1.webm", File("sth-sth-v2/videos/1.webm")),
    "video_localized_narratives_caption": (f"{V}/OVIS/train_mp4_5fps/v.mp4", File("OVIS/train_mp4_5fps/v.mp4")),
    "okvqa": (f"{IMAGE}/images/coco/train2014/1.jpg", File("images/coco/train2014/1.jpg")),
    "tally_qa": (f"{IMAGE}/images/vg/VG_100K_2/1.jpg", File("images/vg/VG_100K_2/1.jpg")),
    "pixmo_cap": (f"{IMAGE}/pixmo_images/0a.jpg", File("pixmo_images/0a")),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_file_of_the_published_layout_is_what_the_source_asks_for(name, tmp_path):
    path, media = ASKED[name]
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes(b"x")
    cache = tmp_path / "cache"
    assert Resolver(source_folders((tmp_path,), name), cache, Downloader(cache)).has(media)
    assert not Resolver((tmp_path / name, tmp_path), cache, Downloader(cache)).has(media)
