"""Video-MME (arXiv 2405.21075), multiple choice of four about videos of 11 seconds to an hour: 2,700 questions.

Data: videomme/test-00000-of-00001.parquet of the Hub's lmms-lab/Video-MME and its videos, unpacked as
data/<videoID>.mp4, together in Video-MME/ in the folder of data sets. Columns read: videoID, question_id, question,
options (with letters), answer (a letter), duration, task_type. Subtitles are not shown (videomme_subtitles shows them).
Score: videomme, as published but for answers without an option; by duration (short, medium, long) and type of question.
"""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.evaluation.video_choice import Row, VideoChoice, VideoChoiceTask

INSTRUCTION = (  # as Video-MME's own evaluation asks
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)


class VideoMme(VideoChoiceTask):
    name = "videomme"
    title = "multiple choice about videos of all lengths (Video-MME)"
    group = "long video QA"
    scorers = ("videomme",)
    places = ("Video-MME", "video_datasets/Video-MME")
    table = "videomme/test-00000-of-00001.parquet"
    fetch = (
        "put there videomme/ of https://huggingface.co/datasets/lmms-lab/Video-MME, and beside it its videos unpacked "
        "as data/"
    )

    def read(self, row: Row, folder: Path, key: str) -> list[VideoChoice]:
        options = list(row["options"])
        asked = "\n".join([INSTRUCTION, row["question"], *options, "The best answer is:"])
        video = folder / "data" / f"{row['videoID']}.mp4"
        tags = {"duration": row["duration"], "type": row["task_type"]}
        lines = row.get("lines", ())
        return [VideoChoice(f"{key}_{row['question_id']}", video, asked, options, row["answer"], tags, lines)]


TASK = VideoMme()
