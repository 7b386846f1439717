"""Styles: the task that each one names, its wordings, and which styles have no prefix.

An annotation names its style; `style_of` returns the `Style` with everything that follows from the name. Only this
module decides what a style takes and which list of wordings it uses; wordings.py and templates.py have the lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from functools import lru_cache

from molmo2_nemo.data.wordings import LISTS, Fields
from molmo2_nemo.errors import UserError, nearest


class Kind(Enum):
    """What an annotation of a style holds, provided that its fields are present."""

    ANSWER = auto()  # a question with an answer or with options
    CAPTION = auto()  # a description that the style's wordings ask for
    TIMED_CAPTION = auto()  # a description of a span of a video, or of a frame
    POINTS = auto()  # points in one image
    MULTI_IMAGE_POINTS = auto()  # points in each of several images
    VIDEO_POINTS = auto()  # points in some frames of a video
    TRACKS = auto()  # objects tracked through a video
    RAW_TEXT = auto()  # a document without a question


RAW_TEXT = "raw_text"
POINT_MODES = {
    "pointing": "point",
    "point": "point",
    "cosyn_point": "point",
    "point_count": "point_count",
    "point_then_count": "point_count",
    "count_then_point": "count_point",
    "count": "count",
    "video_point": "point",
    "video_point_count": "point_count",
    "video_count_point": "count_point",
    "video_count": "count",
    "multi_image_pointing": "point",
    "multi_image_point_then_count": "point_count",
    "multi_image_count_then_point": "count_point",
    "multi_image_counting": "count",
}


@dataclass(frozen=True)
class TrackStyle:
    """A tracking task. Of `..._start_end` and `..._all_frames` of whole tracks only the names are published (the
    released code has no format for them); their answers follow the format of the related styles."""

    wordings: str  # name of a list
    wordings_no_fps: str = ""  # used for half of the prompts at 2 frames per second; "" for none
    on_grid: bool = False  # answer at multiples of 1 / sampling_fps, not at every sampled frame
    ends_only: bool = False  # only the first and the last frame of every object
    from_point: bool = False  # one object; the prompt gives its first point, the answer the rest


NO_FPS = "video_point_track_per_frame_default_fps"
TRACK_STYLES = {
    "video_point_track_per_frame": TrackStyle("video_point_track_per_frame", NO_FPS, on_grid=True),
    "video_point_track_all_frames": TrackStyle(NO_FPS),
    "video_point_track_start_end": TrackStyle("video_point_ground_start_end", ends_only=True),
    "video_point_ground_start_end": TrackStyle("video_point_ground_start_end", ends_only=True),
    "video_single_point_track_per_frame": TrackStyle(
        "video_single_point_track_per_frame", on_grid=True, from_point=True
    ),
    "video_single_point_track_start_end": TrackStyle(
        "video_single_point_track_start_end", ends_only=True, from_point=True
    ),
}
MC_STYLES = frozenset(
    {
        "video_multiple_choice",
        "video_multiple_choice_count_without_pointing",
        "video_multiple_choice_multiple_correct",
        "video_multiple_choice_w_subtitle",
        "a_okvqa_mc",
        "ai2_diagram_no_letter",
        "ai2_diagram",
        "science_qa",
        "eval_multiple_choice",
        "multi_image_mc",
        "multi_image_mc_exp",
        "mantis_instruct_mc",
        "eval_multi_image_mc",
    }
)
DEMO_STYLES = frozenset(
    {
        "point_count",
        "pointing",
        "cosyn_point",
        "user_qa",
        "long_caption",
        "short_caption",
        "video_long_caption",
        "video_short_caption",
        "video_point_track_per_frame",
        "video_point_track_start_end",
        "video_single_point_track_start_end",
        "video_transcript",
        "video_clip_caption_start_end",
        "video_clip_caption_start_end_in_seconds",
        "video_clip_transcript_start_end",
        "video_clip_transcript_start_end_in_seconds",
        "video_frame_caption_timestamp",
        "video_frame_caption_timestamp_in_seconds",
        "correction_qa",
        "text_sft",
        "video_point",
        "video_point_count",
        "video_count",
        "video_count_point",
        "multi_image_pointing",
        "multi_image_counting",
        "multi_image_point_then_count",
        "multi_image_count_then_point",
    }
)
UNCONDITIONED_STYLES = frozenset({"pointing", "point_count", "cosyn_point"})
CAPTIONS = (
    *("long_caption", "short_caption", "video_long_caption", "video_short_caption", "video_transcript"),
    *("video_motion_caption", "video_object_caption"),
)
IN_SECONDS = "_in_seconds"  # after the name of a style, and of a list, whose times are seconds and no clock
TIMED_CAPTIONS = (
    "video_frame_caption_timestamp",
    "video_clip_caption_start_end",
    "video_clip_transcript_start_end",
)
START_END = ("start", "end")
TIME_FIELDS = {"video_frame_caption_timestamp": ("time",)}  # the others have START_END
POINT_WORDS = {  # medium -> what is asked for -> name of a list
    "image": {
        "point": "pointing",
        "point_count": "point_count",
        "count_point": "count_then_point",
        "count": "only_count",
    },
    "video": {
        "point": "video_point",
        "point_count": "video_point_count",
        "count_point": "video_count_point",
        "count": "video_count",
    },
    "multi_image": {
        "point": "multi_image_pointing",
        "point_count": "multi_image_point_then_count",
        "count_point": "multi_image_count_then_point",
        "count": "multi_image_counting",
    },
}

_COSYN = ("chart", "chemical", "diagram", "doc", "math", "music", "table")
PUBLISHED = frozenset(  # further styles of the published data sets; their prefix is the name itself
    {
        *("vqa2", "okvqa", "a_okvqa_da", "text_vqa", "st_qa", "tally_qa", "tabwmp_da", "chart_qa", "doc_qa", "dv_qa"),
        *("figure_qa", "info_qa", "plot_qa", "transcript", "cosyn_document", *(f"cosyn_{kind}_exp" for kind in _COSYN)),
        *("video_short_answer", "video_merged_caption", "video_clip_short_caption_start_end", "charades_sta"),
        *("activitynet_label", "coin_label", "epic_kitchens_label", "kinetics_label", "moments_in_time_label"),
        *("youcook2_label", "ego4d_mq_label_clip", "ego4d_mq_label_start_end", "ego4d_mq_temporal_grounding"),
        *("ego4d_nlq_temporal_grounding", "eval_short_answer"),
    }
)
KNOWN_STYLES = (
    frozenset({*POINT_MODES, *TRACK_STYLES, *CAPTIONS, *TIMED_CAPTIONS, RAW_TEXT}) | MC_STYLES | DEMO_STYLES | PUBLISHED
)
NOT_ON_ONE_IMAGE = {
    **dict.fromkeys(("video_point", "video_point_count", "video_count_point", "video_count"), Kind.VIDEO_POINTS),
    "multi_image_pointing": Kind.MULTI_IMAGE_POINTS,
    "multi_image_point_then_count": Kind.MULTI_IMAGE_POINTS,
    "multi_image_count_then_point": Kind.MULTI_IMAGE_POINTS,
    "multi_image_counting": Kind.MULTI_IMAGE_POINTS,
}  # the other pointing and counting styles are on one image
EXPLAINED = "exp"  # a word of a style's name: the answer starts with an explanation, and the question asks for one


@dataclass(frozen=True)
class Style:
    """The properties of a style."""

    name: str
    kind: Kind
    wordings: str = field(default="", repr=False)  # list of prompts without a question; for tracks see `track`
    question_wordings: str = field(default="", repr=False)  # list, one of which is put around a question; "": none
    count: str = ""  # points: point, point_count, count_point or count
    time_fields: tuple[str, ...] = ()  # timed captions: the annotation's fields in seconds that the wordings use
    track: TrackStyle | None = field(default=None, repr=False)

    def asks_for(self, name: str) -> bool:
        """Whether one of the wordings has a place for the field `name`."""
        allowed = LISTS.get(self.wordings, Fields())
        return name in (*allowed.required, *allowed.optional)


@lru_cache(maxsize=1024)
def style_of(name: str) -> Style:
    """The style of that name, or of `own:NAME`. A name that is not known stands for a question with an answer."""
    name = own_name(name)
    if name == RAW_TEXT:
        return Style(name, Kind.RAW_TEXT)
    if name in TRACK_STYLES:
        return Style(name, Kind.TRACKS, track=TRACK_STYLES[name])
    if name in POINT_MODES:
        kind = NOT_ON_ONE_IMAGE.get(name, Kind.POINTS)
        # When the answer is in words, a task on several images is worded like one on a single image.
        medium = "video" if kind is Kind.VIDEO_POINTS else "image"
        return Style(name, kind, POINT_WORDS[medium][POINT_MODES[name]], count=POINT_MODES[name])
    if name in TIMED_CAPTIONS:
        return Style(name, Kind.TIMED_CAPTION, name, time_fields=TIME_FIELDS.get(name, START_END))
    if canonical_style(name) == "video_short_answer":
        return Style(name, Kind.ANSWER, question_wordings="video_short_answer")
    explained = "explanation" if EXPLAINED in name.split("_")[1:] else ""
    if name in CAPTIONS:
        return Style(name, Kind.CAPTION, name, question_wordings=explained)
    return Style(name, Kind.ANSWER, question_wordings=explained)


OWN = "own:"  # prefix of a style that only the user's own data has, in the data and when asking a model


def own_name(style: str) -> str:
    """The style without the prefix that says it is meant."""
    return style.removeprefix(OWN) if len(style) > len(OWN) else style


def asked_style(style: object) -> str:
    """The style that a user names, in data or in a question to a trained model. An unknown name is more likely a typo
    than a style of the user's own, so these are written `own:NAME`; training words them as a question with an answer.

    Raises:
        UserError: not a string, or an unknown name.
    """
    if not isinstance(style, str) or not style.strip():
        raise UserError(f"a style is a name such as user_qa or long_caption, not {style!r}")
    name = own_name(style)
    if name != style and name == name.strip():
        return name
    if style.lower().startswith(OWN):
        raise UserError(f"unknown style {style!r}; a style of your own data is written {OWN}NAME")
    if canonical_style(style) not in KNOWN_STYLES and style not in KNOWN_STYLES:
        hint = nearest(style, KNOWN_STYLES)
        if not hint.startswith("did"):
            hint = "known are user_qa, long_caption, video_long_caption, pointing, ..."
        raise UserError(f"unknown style {style!r}; {hint} (a style of your own data is written {OWN}{style})")
    return style


def canonical_style(style: str) -> str:
    """The style that a prefix names: evaluation aliases and counting variants are mapped to their base style."""
    aliases = {"eval_short_answer": "vqa2", "eval_multiple_choice": "a_okvqa_mc"}
    style = aliases.get(style, style)
    if style.startswith("video_eval_"):
        style = "video_" + style.removeprefix("video_eval_")
    if style.startswith("eval_multi_image_"):
        style = style.removeprefix("eval_")
    return style.removesuffix("_count_without_pointing")
