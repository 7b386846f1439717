"""VideoEval-Pro (arXiv 2505.14640), its multiple-choice form: hard questions about long videos.

Data: data/test-00000-of-00001.parquet of the Hub's TIGER-Lab/VideoEval-Pro and its videos, unpacked as
videos/videos_filtered/<video> or videos_filtered/<video>, together in VideoEvalPro/ in the folder of data sets. Columns
read: video, question, options (with letters), answer (a letter), source, qa_type. Score: option_start, as published; by
source and type of question. The open-ended form needs a judge.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.evaluation.video_choice import Row, VideoChoice, VideoChoiceTask

INSTRUCTION = "Please respond with only the letter of the correct answer."


class VideoEvalPro(VideoChoiceTask):
    name = "videoevalpro"
    title = "hard multiple choice about long videos (VideoEval-Pro)"
    group = "long video QA"
    scorers = ("option_start",)
    places = ("VideoEvalPro", "video_datasets/VideoEvalPro")
    table = "data/test-00000-of-00001.parquet"
    fetch = (
        "put there data/ of https://huggingface.co/datasets/TIGER-Lab/VideoEval-Pro, and beside it its videos unpacked "
        "as videos_filtered/"
    )

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        options = list(row["options"])
        asked = "\n".join([row["question"], *options, INSTRUCTION])
        inner = folder / "videos"
        video = (inner if inner.is_dir() else folder) / "videos_filtered" / row["video"]
        tags = {"source": str(row["source"]), "type": str(row["qa_type"])}
        return [VideoChoice(f"{key}_{row['video']}", video, asked, options, row["answer"].strip()[0], tags)]


TASK = VideoEvalPro()
