"""The validation splits of published data sets, as the released loaders read them.

A data set of the Hub has it as another split or configuration, one that is downloaded by hand in another file. PixMo's
sets have none on the Hub, ST-VQA and AI2D none at all: the released loaders hold some of the training split out, and
what training leaves out there is their validation split (`Context.validation`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from data_prep.sources.base import Hub, Manual, Origin, Source

Change = Callable[[Origin], Origin]


def _hub(**fields: Any) -> Change:
    def change(origin: Origin) -> Origin:
        assert isinstance(origin, Hub)
        return replace(origin, **fields)

    return change


def _table(path: str) -> Change:
    def change(origin: Origin) -> Origin:
        assert isinstance(origin, Manual) and len(origin.tables) == 1
        (table,) = origin.tables
        fetch = f"{origin.fetch}; of the validation split, {path}"
        return replace(origin, fetch=fetch, tables=(replace(table, path=path, repo="", url=""),))

    return change


# In the released code: olmo/data/academic_image_datasets.py, academic_multi_image_datasets.py, pixmo_datasets.py
VALIDATION_ORIGINS: dict[str, Change] = {
    "pixmo_count_train": _hub(split="validation"),
    "pixmo_multi_image_qa_multi_only_max5": _hub(split="validation"),
    "pixmo_multi_points": _hub(split="validation"),
    "coco_2014_vqa_multi": _hub(configs=("validation",)),
    "text_vqa": _hub(configs=("validation",)),
    "okvqa": _hub(configs=("validation",)),
    "a_okvqa_mc": _hub(configs=("validation",)),
    "a_okvqa_da": _hub(configs=("validation",)),
    "chart_qa_weighted": _hub(split="val"),
    "science_qa_img": _hub(split="validation"),
    "doc_qa": _table("val_v1.0_withQT.json"),
    "info_qa": _table("infographicsVQA_val_v1.0_withQT.json"),
    "dv_qa": _table("val_easy_qa.json"),
    "tabwmp_da": _table("problems_dev.json"),
}
HELD_OUT = (  # by `common.hold_out`, or as the released builders do
    "pixmo_cap",
    "pixmo_cap_with_transcripts",
    "pixmo_points_train",
    "pixmo_points_high_freq_train",
    "pixmo_ask_model_anything",
    "pixmo_cap_qa_as_user_qa",
    "st_qa",
    "ai2_diagram_v2_mix_transparent",
)


def origin_of(source: Source) -> Origin:
    """Where the rows of a data set's validation split are; the same where training leaves them out."""
    change = VALIDATION_ORIGINS.get(source.name)
    return source.origin if change is None else change(source.origin)


def names() -> list[str]:
    """The data sets that have one, in order."""
    return sorted((*VALIDATION_ORIGINS, *HELD_OUT))
