"""The four Molmo2 data sets of captions and questions about videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from data_prep.sources.base import (
    AnnotationJson,
    Context,
    File,
    Hub,
    Row,
    Sample,
    Skip,
    Source,
    SourceError,
    Table,
    maybe,
    number,
)
from data_prep.sources.shapes import caption, qa, shuffled_choice
from data_prep.sources.shapes_video import (
    CORRUPT,
    EMPTY_ANSWER,
    YOUTUBE_CC_MEDIA,
    UniqueKeys,
    all_lines,
    per_group,
    youtube_cc,
)

if TYPE_CHECKING:
    import numpy as np

LICENCE = "ODC-BY 1.0 (annotations); the videos keep their owners' licences"
MIN_SCORE = 3  # of the annotators' work, 0 to 5
CORRUPT_VIDEOS = frozenset(
    {"0OfUqrbRa2Y", "mTXBQzptWAg", "NyuA4FatDQk", "a_", "gsfIHiBB6xE", "bXApJtAf6Qo", "N8BlpYSpgg4"}
)
CAPTION_STYLES = {  # in the order of the branches before training shuffles them
    "merged_caption": "video_merged_caption",
    "video_caption": "video_short_caption",
    "video_frame_merged_caption": "video_long_caption",
}
_LLAVA_SPANS = ("0_30_s", "30_60_s", "1_2_m", "2_3_m")


KOALA = Table("koala_meta/*.json", key="field")  # one object per file; `url` names the video on YouTube


def koala_names(ctx: Context) -> dict[str, str]:
    """YouTube id -> the name of the video in Koala-36M; empty where koala_meta.zip was not unpacked."""
    names: dict[str, str] = {}
    try:
        for row in ctx.rows(KOALA):
            if row["field"] == "url" and "v=" in str(row.get("value")):
                names.setdefault(row["value"].split("v=", 1)[1], PurePosixPath(row["__table__"]).stem)
    except SourceError:  # its videos can also be named by id
        return {}
    return names


def caption_video(video_id: str, koala: str | None = None) -> File:
    """A video of Molmo2-Cap by its id, in any of the folders of the published loader, or directly below --source."""
    llava = [f"LLaVA-Video-178K/{s}_academic_v0_1/academic_source/activitynet/v_{video_id}" for s in _LLAVA_SPANS]
    youtube = "LLaVA-Video-178K/{}_youtube_v0_1/liwei_youtube_videos/videos/{}"
    llava += [youtube.format(s, f"youtube_video_2024/ytb_{video_id}") for s in _LLAVA_SPANS]
    llava.append(youtube.format("1_2_m", f"hdvila/{video_id}"))
    batches = [f"{folder}/batch_1/{video_id}" for folder in ("youtube_temporal", "intern", "kw_youtube", "koala")]
    batches += [f"koala/batch_1/{koala}"] if koala else []
    return File(*youtube_cc(video_id).paths[:3], *batches, *llava, *youtube_cc(video_id).paths[3:])


def _captions(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    unique, koala = UniqueKeys(), koala_names(ctx)
    for row in rows:
        key = unique(row["video_id"])
        if row["video_id"] in CORRUPT_VIDEOS:
            yield Skip(key, CORRUPT)
        elif row["annotation_score"] < MIN_SCORE:
            yield Skip(key, f"annotation score below {MIN_SCORE}")
        else:
            made = [caption(row[name], style) for name, style in CAPTION_STYLES.items() if row.get(name)]
            video = caption_video(row["video_id"], koala.get(row["video_id"]))
            yield Sample(key, made, video=video) if made else Skip(key, "no caption")


def _asked(row: Row, rng: np.random.Generator) -> list[AnnotationJson] | str:
    answer = row["answer"].strip()
    return [qa(row["question"].strip(), answer)] if answer else EMPTY_ANSWER


def _chosen(row: Row, rng: np.random.Generator) -> list[AnnotationJson]:
    return [shuffled_choice(row["Question"], row["Answer"], row["NegativeAnswers"], rng)]


def _seen(rows: list[Row]) -> dict[str, Any]:
    return {"video": youtube_cc(rows[0]["video_id"])}


def _heard(rows: list[Row]) -> dict[str, Any]:
    """The subtitles of a video. All of its rows carry the same ones, so those of the first row are used."""
    return {**_seen(rows), "subtitles": all_lines(rows[0]["subtitle"])}


CHOICE_FIELDS = {"video_id": str, "Question": str, "Answer": str, "NegativeAnswers": [str]}

SOURCES = (
    Source(
        name="molmo2_captions",
        mixes={"sft": "demo"},
        kind="video, captions",
        origin=Hub(
            "allenai/Molmo2-Cap",
            media="videos by YouTube id: in the published folders (youtube-cc/..., youtube_temporal/batch_1/, "
            "intern/batch_1/, kw_youtube/batch_1/, LLaVA-Video-178K/...) or as <id>.mp4; those of Koala-36M as "
            "koala/batch_1/<its name>.mp4 with koala_meta.zip of the repository unpacked, or <YouTube id>.mp4",
        ),
        licence=LICENCE,
        fields={"video_id": str, "annotation_score": number, **{name: maybe(str) for name in CAPTION_STYLES}},
        records=_captions,
        published_as="vixmo3_top_level_captions_min_3",
        notes="Score below 3 and 7 corrupt videos are left out; the mixture gives it the weight 0.1.",
    ),
    Source(
        name="molmo2_human_qa",
        mixes={"sft": "demo"},
        kind="video, question and answer",
        origin=Hub("allenai/Molmo2-AskModelAnything", split="HumanQA", media=YOUTUBE_CC_MEDIA),
        licence=LICENCE,
        fields={"video_id": str, "question": str, "answer": str},
        records=per_group("video_id", _asked, _seen),
        notes="Empty answers are left out; one record per video.",
    ),
    Source(
        name="molmo2_syn_captions_qa",
        mixes={"sft": "video_academic"},
        kind="video, multiple choice",
        origin=Hub("allenai/Molmo2-VideoCapQA", split="CapQA", media=YOUTUBE_CC_MEDIA),
        licence=LICENCE,
        fields=CHOICE_FIELDS,
        records=per_group("video_id", _chosen, _seen),
        published_as="vixmo_syn_video_capqa_v2",
        resolvable=False,
        notes="The right answer is put at a random place among the wrong ones, once.",
    ),
    Source(
        name="molmo2_syn_captions_subtitle_qa",
        mixes={"sft": "video_academic"},
        kind="video with subtitles, multiple choice",
        origin=Hub("allenai/Molmo2-VideoSubtitleQA", split="SubtitleQA", media=YOUTUBE_CC_MEDIA),
        licence=LICENCE,
        fields={**CHOICE_FIELDS, "subtitle": [{"start": number, "end": number, "text": str}]},
        records=per_group("video_id", _chosen, _heard),
        published_as="vixmo_syn_video_capqa_with_sub_v2",
        resolvable=False,
        notes="As molmo2_syn_captions_qa, with subtitles; the style stays video_multiple_choice, as published.",
    ),
)
