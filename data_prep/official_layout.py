"""The folders of the published code: where below its data root (`MOLMO_DATA_DIR`) each data set's files lie.

`molmo2 prepare NAME --source ROOT` looks in ROOT/NAME and ROOT, and, where ROOT is such a data root or one of its main
folders, where the published code looks. The folders are those that its classes join; data_sets.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data_prep.sources import all_sources

IMAGES, VIDEOS = "torch_datasets", "video_datasets"
TRACKS = f"{VIDEOS}/video_track"
HOMES: dict[str, tuple[str, ...]] = {  # data set -> folders below the data root that its paths count from
    "doc_qa": (f"{IMAGES}/docqa",),
    "info_qa": (f"{IMAGES}/info_qa",),
    "st_qa": (f"{IMAGES}/scene-text",),
    "tgif": (f"{VIDEOS}/TGIF",),
    "llava_video_mc_academic": (f"{VIDEOS}/LLaVA-Video-178K",),
    "llava_video_oe_academic": (f"{VIDEOS}/LLaVA-Video-178K",),
    "news_video_qa_filtered": (f"{VIDEOS}/NewsVideoQA/final_data_feb_16",),
    "cinepile_with_sub": (f"{VIDEOS}/cinepile",),
    "countix_oe": (f"{VIDEOS}/kinetics", f"{VIDEOS}/kinetics/kinetics700", f"{VIDEOS}/Countix"),
    "camerabench_qa": (f"{VIDEOS}/CameraBench",),
    "perception_test": (f"{VIDEOS}/perception_test",),
    "nextqa_mc": (f"{VIDEOS}/NeXTQA",),
    "sutd_trafficqa": (f"{VIDEOS}/SUTD-TrafficQA",),
    "social_iq2": (f"{VIDEOS}/social-iq2",),
    "sportsqa_oe": (f"{VIDEOS}/SportsQA",),
    "clevrer": (f"{VIDEOS}/CLEVRER",),
    "funqa": (f"{VIDEOS}/FunQA",),
    "intent_qa": (f"{VIDEOS}/IntentQA",),
    "video_localized_narratives": (f"{VIDEOS}/video-localized-narratives", f"{VIDEOS}/oops"),
    "video_localized_narratives_caption": (f"{VIDEOS}/video-localized-narratives",),
    "road_text_vqa": (f"{VIDEOS}/RoadTextVQA",),
    "tvqa_with_sub": (f"{VIDEOS}/TVQA", f"{VIDEOS}/TVQA/video-frames"),
    "paxion": (f"{VIDEOS}/paxion",),
    "how2qa": (f"{VIDEOS}/how2QA",),
    "star": (f"{VIDEOS}/STAR", f"{VIDEOS}/Charades"),
    "qv_highlights": (f"{VIDEOS}/QVHighlights",),
    "motionbench_train": (f"{VIDEOS}/MotionBench",),
    "moments_in_time_qa": (f"{VIDEOS}/moments_in_time/Moments_in_Time_Raw",),
    "kinetics_qa": (f"{VIDEOS}/kinetics",),
    "charades_sta_all_qa": (f"{VIDEOS}/Charades",),
    "coin_all_qa": (f"{VIDEOS}/coin",),
    "youcook2_all_qa": (f"{VIDEOS}/youcook2",),
    "activitynet_all_qa": (f"{VIDEOS}/ActivityNet",),
    "ego4d_all": (f"{VIDEOS}/Ego4d",),
    "epic_kitchens_qa": (f"{VIDEOS}/epic-kitchens",),
}
MAIN = (IMAGES, VIDEOS, TRACKS)  # from where the paths of all other data sets count
# Sets that the published code keeps only as its own packed copies, or in the cache of the Hub's library: what to do.
PACKED = {
    "ai2_diagram_v2_mix_transparent": "`ai2d-all.zip`, unpacked: `--fetch`, or link its `ai2d/` as `ROOT/NAME`",
    "tabwmp_da": "PromptPG's `data/tabmwp/`: `--fetch`, or link it as `ROOT/NAME`",
    "dv_qa": "`images/` and `train_qa.json`: `--fetch`, or link them below `ROOT/NAME/`",
    "figure_qa": "`train1/` of its archive: `--fetch`, or link it as `ROOT/NAME`",
    "plot_qa": "`png/` of the training images and `qa_pairs.json`: `--fetch`, or link them below `ROOT/NAME/`",
}


def source_folders(roots: Iterable[Path], name: str) -> tuple[Path, ...]:
    """The folders that the files of a data set are looked for in, in this order; those that exist.

    Args:
        roots: folders given with --source.
    """
    homes = HOMES.get(name, ())
    inside = [home.split("/", 1)[1] for home in homes]  # of a root that is itself one of the main folders
    official = (*MAIN, "video_track") if name in all_sources() else ()
    found: dict[Path, None] = {}
    for root in roots:
        for place in (name, *homes, *inside, "", *official):
            if (root / place).is_dir():
                found.setdefault(root / place)
    return tuple(found)


def official_folder(name: str) -> str:
    """In words: where the published code keeps what a set needs beside its rows."""
    if name in PACKED:
        return PACKED[name].replace("NAME", name)
    return "; ".join(f"`{home}/`" for home in HOMES.get(name, ()))
