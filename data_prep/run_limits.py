"""The settings of training that records are checked with where they are prepared, indexed and checked: those of a run
that the user names (`--for recipe=8b stage=long`), or the defaults.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from data_prep.estimate import image_cost, video_crops
from data_prep.text_length import tokenizer_at
from molmo2_nemo.data.check import View
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.image import TileGeometry
from molmo2_nemo.data.json_values import Fault
from molmo2_nemo.data.record import BadRecord, Record
from molmo2_nemo.errors import plural

IGNORED = ("decoder", "buffer_size", "crop_value", "mode", "balance", "balance_window", "max_wait")  # no limits


def only_limits(config: DataConfig) -> DataConfig:
    """The settings without the mixture, which workers would get with every batch."""
    return replace(config, sources={}, groups={}, progression=[], lengths=[])


def changed(config: DataConfig) -> dict[str, Any]:
    """The settings that records are checked with and that are not the defaults: dotted name -> value."""
    there, usual = _values(config), _values(DataConfig())
    return {name: value for name, value in there.items() if value != usual[name]}


def _values(config: DataConfig) -> dict[str, Any]:
    parts = {name: asdict(getattr(config, name)) for name in ("image", "video", "packing", "limits")}
    return {f"{part}.{n}": v for part, values in parts.items() for n, v in values.items() if n not in IGNORED}


def in_words(config: DataConfig) -> str:
    """The limits that matter to most records, for a summary."""
    image, video, packing = config.image, config.video, config.packing
    usual = "those of the run, too" if config.tokenizer else "--for recipe=8b stage=long: a run's"
    named = "the limits asked for" if changed(config) else f"the default limits; {usual}"
    return (
        f"checked for {plural(image.max_images, 'image')}, {plural(video.max_frames, 'frame')} "
        f"({video.max_fps:g} a second), "
        f"packs of {packing.sequence_length:,} tokens\n  and {packing.max_crops} crops, cut pictures "
        f"{'loaded' if image.truncated == 'load' else 'skipped'} ({named});\n  texts {_measured(config)}"
    )


def _measured(config: DataConfig) -> str:
    if tokenizer_at(config.tokenizer) is not None:
        return f"counted with the tokenizer {config.tokenizer}"
    if not config.tokenizer:
        return "measured by estimate (--for: with the run's tokenizer)"
    return f"measured by estimate (there is no tokenizer at {config.tokenizer})"


def check_fits(record: Record, view: View, config: DataConfig) -> None:
    """Check that a pack holds the media of a record.

    Raises:
        BadRecord: their crops, or the visual tokens alone, are more than a pack holds; training skips such a record.
    """
    if record.video is not None:
        crops = video_crops(view.duration, view.fps, record.sampling, config.video)
        side = -(-TileGeometry.of(config.image).grid // config.video.pool)
        tokens = crops * side * side
    elif view.image_sizes:
        tokens, crops = image_cost(view.image_sizes, config.image)
    else:
        return
    packing = config.packing
    if tokens > packing.sequence_length or crops > packing.max_crops:
        seen = f"{tokens:,} visual tokens and {crops} crops"
        held = f"{packing.sequence_length:,} and {packing.max_crops}"
        names = "(data.packing.sequence_length, data.packing.max_crops)"
        fault = Fault("images" if record.video is None else "video", seen, f"at most {held} {names}")
        raise BadRecord(record.key, "too long", f"its media give {seen}; a pack holds {held} {names}", fault)
