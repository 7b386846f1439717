"""MVBench (arXiv 2311.17005), multiple choice about short videos: 20 tasks of 200 questions each.

Data: json/<task>.json of the Hub's OpenGVLab/MVBench and its archives unpacked as video/, together in MVBench/ in the
folder of data sets; what is in video/data0613/ moved up to video/. By hand: the videos of NTU RGB+D (fine-grained pose)
to video/nturgbd/, and of each folder of pictures in video/tvqa/frames_fps3_hq/ (episodic reasoning) a film at three
pictures a second in it: ffmpeg -framerate 3 -pattern_type glob -i '*.jpg' video.mp4.
Fields read: video, question, candidates, answer (one of them), start and end (seconds, of some). Only the part between
start and end is shown, as released. Score: option_start, as released; by task.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.evaluation.choice import LETTERS
from molmo2_nemo.evaluation.tasks.videoevalpro import INSTRUCTION
from molmo2_nemo.evaluation.video_choice import Row, VideoChoice, VideoChoiceTask, listed, table_rows

CHARADES, CLEVRER, PERCEPTION = "star/Charades_v1_480", "clevrer/video_validation", "perception/videos"
FRAMES = "tvqa/frames_fps3_hq"
FOLDERS = {  # task -> folder of its videos
    "action_sequence": CHARADES,
    "action_prediction": CHARADES,
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": CLEVRER,
    "object_interaction": CHARADES,
    "object_shuffle": PERCEPTION,
    "moving_direction": CLEVRER,
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": PERCEPTION,
    "moving_count": CLEVRER,
    "moving_attribute": CLEVRER,
    "state_change": PERCEPTION,
    "fine_grained_pose": "nturgbd",
    "character_order": PERCEPTION,
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": FRAMES,
    "counterfactual_inference": CLEVRER,
}


class MvBench(VideoChoiceTask):
    name = "mvbench"
    title = "multiple choice about short videos, 20 tasks (MVBench)"
    group = "short video QA"
    scorers = ("option_start",)
    places = ("MVBench", "video_datasets/MVBench")
    table = "json/action_sequence.json"
    fetch = (
        "put there json/ of https://huggingface.co/datasets/OpenGVLab/MVBench, and beside it its archives unpacked as "
        "video/ (evaluation/tasks/mvbench.py says what is to be made by hand)"
    )

    def rows(self, folder: Path) -> Iterator[tuple[str, Row]]:
        """The questions of all 20 files."""
        for task in FOLDERS:
            for where, row in table_rows(folder / "json" / f"{task}.json"):
                yield where, {**row, "task": task}

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        options, place = list(row["candidates"]), FOLDERS[row["task"]]
        asked = "\n".join([row["question"], listed(options), INSTRUCTION])
        video = folder / "video" / place / row["video"]
        clip = None if row.get("start") is None else (float(row["start"]), float(row["end"]))
        return [
            VideoChoice(
                f"{key}_{row['video']}",
                video / "video.mp4" if place == FRAMES else video,
                asked,
                options,
                LETTERS[options.index(row["answer"])],
                {"task": row["task"]},
                clip=clip,
            )
        ]


TASK = MvBench()
