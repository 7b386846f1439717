"""Archives laid out as the official code expects them end where our sources look: catalogue and sources fit.

The members are those that the official classes open after unpacking (`found_in` of the item names their module); the
media are asked for as the sources ask for them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.bringing.catalogue import load
from data_prep.bringing.fetch import Fetcher, Job
from data_prep.bringing.journal import WORK
from data_prep.bringing.needs import is_there
from data_prep.download import Downloader
from data_prep.media import Resolver
from data_prep.sources import all_sources
from data_prep.sources.base import File, Frames, Manual
from data_prep.sources.tracking import SINGLE, clip_media
from data_prep.tables import Tables
from tests.support.servers import tarred, zipped

# item -> (archive by its repository path, or "" for a single address) -> members
ARCHIVES: dict[str, dict[str, list[str]]] = {
    "coco_train2014": {"": ["train2014/COCO_train2014_1.jpg"]},
    "coco_val2014": {"": ["val2014/COCO_val2014_1.jpg"]},
    "coco_train2017": {"": ["train2017/1.jpg"]},
    "vg_part1": {"": ["VG_100K/1.jpg"]},
    "vg_part2": {"": ["VG_100K_2/1.jpg"]},
    "textvqa_images": {"": ["train_images/1.jpg"]},
    "ai2d": {"": ["ai2d/images/1.png", "ai2d/questions/1.png.json", "ai2d/annotations/1.png.json"]},
    "tabmwp": {
        "": [
            "lupantech-PromptPG-1a2b/data/tabmwp/tables/1.png",
            "lupantech-PromptPG-1a2b/data/tabmwp/problems_train.json",
        ]
    },
    "dvqa_images": {"": ["images/bar_train_1.png"]},
    "dvqa_questions": {"": ["train_qa.json"]},
    "figureqa": {"": ["train1/png/1.png", "train1/qa_pairs.json"]},
    "plotqa_images": {"": ["png/1.png"]},
    "koala_meta": {"koala_meta.zip": ["koala_meta/a.json"]},
    "llava_mc": {"0_30_s_nextqa/videos.tar.gz": ["NextQA/1.mp4"], "0_30_s_perceptiontest/videos_1.tar.gz": ["v/1.mp4"]},
    "perception_videos": {"": ["videos/video_1.mp4"]},
    "perception_rows": {"": ["all_train.json"]},
    "sportsqa_meta": {"": ["meta-data/train.json"]},
    "clevrer_videos": {"": ["video_00000-01000/video_00000.mp4"]},
    "funqa_videos": {"train.zip": ["train/train_humor/1.mp4"]},
    "vidln_qa": {"": ["videoqa/text_output/oops_train/qa_text_output.json"]},
    "qvhighlights": {"": ["videos/a.mp4"]},
    "mammalnet": {"": ["trimmed_video/a.mp4"]},
    "tgif_videos": {"videos_1.zip": ["videos_1/gif_a.mp4"]},
    "generated_videos": {"generated_videos/sora2.tar.gz": ["sora2/a.mp4"]},
    "mevis": {"MeViS_release.zip": ["MeViS_release/train/meta.json"]},
    "lv_vis": {"": ["train/JPEGImages/v/0.jpg"]},
    "tao_amodal": {"frames/train/BDD.zip": ["v/0.jpg"]},
    "davis17": {"": ["DAVIS/JPEGImages/480p/v/0.jpg"]},
    "moca": {"": ["MoCA/JPEGImages/v/0.jpg"]},
    "lvosv1": {"": ["train/JPEGImages/v/0.jpg"]},
    "lvosv2": {"": ["train/JPEGImages/v/0.jpg"]},
    "lasot": {"cat.zip": ["cat-1/img/0.jpg"]},
    "trackingnet": {"TRAIN_0/zips/a.zip": ["a/0.jpg"], "TRAIN_11/zips/b.zip": ["b/0.jpg"]},
    "uwcot": {"": ["UW-COT220/v/v.mp4"]},
    "webuot": {"": ["Train/v/v.mp4"]},
    "mosev2": {"train.tar.gz.aa": ["train/JPEGImages/v/0.jpg"]},
    "mose": {"MOSE_release.zip": ["MOSE_release/x.txt"]},
    "animaltrack": {"": ["videos_all/v.mp4"]},
    "bft": {"": ["v/0.jpg"]},
    "mot15": {"": ["MOT15/train/KITTI-13/img1/0.jpg"]},
    "mot16": {"": ["train/MOT16-02/img1/0.jpg"]},
    "mot17": {"": ["MOT17/train/MOT17-02/img1/0.jpg"]},
    "mot20": {"": ["MOT20/train/MOT20-01/img1/0.jpg"]},
    "dancetrack1": {"train1.zip": ["train1/v/img1/0.jpg"]},
    "dancetrack2": {"train2.zip": ["train2/w/img1/0.jpg"]},
    "uavdt": {"": ["UAV-benchmark-M/v/0.jpg"]},
    "seadronessee": {"": ["Compressed/train/0.jpg"]},
}
NESTED = {"mevis": "train/JPEGImages.tar", "mose": "train.tar.gz"}  # archives in archives, below their release folder
SINGLE_FILES = {"plotqa_questions", "clevrer_rows", "roadtext_rows", "seadronessee_rows"}
NOT_MADE = {"llava_oe", "motionbench", "vicas", "teamtrack"}  # as llava_mc; plain files; a step by hand


# data set -> media as its source asks for them
ASKED: dict[str, list[File | Frames]] = {
    "okvqa": [File("images/coco/train2014/COCO_train2014_1.jpg"), File("images/coco/val2014/COCO_val2014_1.jpg")],
    "a_okvqa_mc": [File("images/coco/train2017/1.jpg")],
    "tally_qa": [File("images/vg/VG_100K/1.jpg"), File("images/vg/VG_100K_2/1.jpg")],
    "text_vqa": [File("text_vqa/train_images/1.jpg")],
    "ai2_diagram_v2_mix_transparent": [File("images/1.png")],
    "tabwmp_da": [File("tables/1.png")],
    "dv_qa": [File("images/bar_train_1.png")],
    "figure_qa": [File("png/1.png")],
    "plot_qa": [File("png/1.png")],
    "llava_video_mc_academic": [File("0_30_s_nextqa/NextQA/1.mp4"), File("0_30_s_perceptiontest/v/1.mp4")],
    "perception_test": [File("train_videos/video_1")],
    "tgif": [File("videos/gif_a")],
    "clevrer": [File("video_00000-01000/video_00000.mp4")],
    "funqa": [File("train/train_humor/1.mp4")],
    "qv_highlights": [File("videos/a")],
    "molmo2_video_point_minmax_0_5": [File("MammalNet/trimmed_video/a"), File("generated_videos/sora2/a")],
    "lv_vis_track": [Frames("LV-VIS/train/JPEGImages/v", 6)],
    "mevis_track": [Frames("MeViS/MeViS_release/train/JPEGImages/v", 6)],
    "burst_track": [Frames("TAO-Amodal/frames/train/BDD/v", 6)],
    "ref_davis17_track": [Frames("Ref-DAVIS17/DAVIS/JPEGImages/480p/v", 6)],
    "moca_track": [Frames("MoCA/MoCA/JPEGImages/v", 6)],
    "uwcot_single_point_track": [File("UW-COT220/UW-COT220/v/v")],
    "webuot_single_point_track": [File("webuot/Train/v/v")],
}
CLIPS = {  # source of Molmo2's own tracks -> a video
    **{"mose": "v", "mosev2": "v", "bft": "v", "uavdt": "v", "dancetrack": "v"},
    "mot2020": "MOT16-02",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Everything that can be fetched, from archives as they are published, through the steps of `--fetch`."""
    folder = tmp_path_factory.mktemp("root")
    catalogue = load()
    fetcher = Fetcher(folder, Downloader(folder / WORK / "downloads"), catalogue)
    for name, archives in ARCHIVES.items():
        item = catalogue.items[name]
        for path, members in archives.items():
            files = {member: b"x" for member in members}
            if name in NESTED:
                top = members[0].split("/")[0]
                pictures = "JPEGImages/v/0.jpg" if name == "mevis" else "train/JPEGImages/v/0.jpg"
                files[f"{top}/{NESTED[name]}"] = tarred({pictures: b"x"}, "w" if name == "mevis" else "w:gz")
            content = tarred(files) if "tar" in path or path == "" and name.startswith("figure") else zipped(files)
            archive = folder / WORK / "archive"
            archive.parent.mkdir(exist_ok=True)
            archive.write_bytes(content)
            parts = Path(path)
            into = item.into.format(
                dir="" if str(parts.parent) == "." else parts.parent,
                top=parts.parts[0] if path else "",
                stem=parts.name.split(".")[0],
            )
            fetcher._place(Job(item, name, (f"https://x/{name}/{path}",), into), archive)
    for name in SINGLE_FILES:
        item = catalogue.items[name]
        (folder / item.into).mkdir(exist_ok=True)
        (folder / item.into / item.file).write_text("[]")
    return folder


def test_every_fetched_item_is_made_here():
    fetched = {item.name for item in load().items.values() if item.how in ("fetch", "hub")}
    assert fetched == set(ARCHIVES) | SINGLE_FILES | NOT_MADE


@pytest.mark.parametrize("name", sorted(set(ARCHIVES) | SINGLE_FILES))
def test_an_item_is_there_once_it_was_placed(root, name):
    item = load().items[name]
    assert is_there(item, root) or not item.there


@pytest.mark.parametrize("name", sorted(ASKED))
def test_media_are_where_the_source_looks(root, name):
    resolver = Resolver(tuple(f for f in (root / name, root) if f.is_dir()), root / WORK, Downloader(root / WORK))
    assert [media for media in ASKED[name] if not resolver.has(media)] == []


@pytest.mark.parametrize("source, video", CLIPS.items())
def test_frames_of_molmo2s_own_tracks(root, source, video):
    resolver = Resolver((root,), root / WORK, Downloader(root / WORK))
    media = clip_media({"video_dataset": source, "video": video, "clip": f"{video}_0"}, {})
    assert any(resolver.has(one) for one in media.media)


def test_chunks_of_trackingnet(root):
    resolver = Resolver((root,), root / WORK, Downloader(root / WORK))
    for video, found in (("a", True), ("b", True), ("c", False)):
        media = SINGLE["trackingnet"][2].media({"video": video, "fps": 30}, {})
        assert any(resolver.has(one) for one in media.media) == found


@pytest.mark.parametrize("name", [n for n, s in all_sources().items() if isinstance(s.origin, Manual)])
def test_tables_that_are_fetched_are_where_the_source_looks(root, name):
    """Data sets of which every item is fetched have all their tables then."""
    items = load().of([name])
    if all(item.how in ("fetch", "hub") for item in items):
        Tables(tuple(f for f in (root / name, root) if f.is_dir())).check(all_sources()[name])
