"""Runs a source on rows made in a test: samples and skips, every sample also as the record that the trainer reads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.record_builder import Asked, check_usable
from data_prep.sources import find_source
from data_prep.sources.base import Context, Sample, Skip, convert
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.check import View
from molmo2_nemo.data.config import DataConfig, ImageConfig, TextFormatConfig, VideoConfig
from molmo2_nemo.data.record import Record, parse_record
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer

FILM = Path(__file__).parents[2] / "data_prep" / "demo_media" / "bunny.mp4"  # 5 s, 480 x 270
STAGE1 = TextFormatConfig("none", "style_and_length_v2", "html-v1", False, False)


def png(width: int = 80, height: int = 60) -> bytes:
    """A small picture."""
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def prepare(
    name: str,
    rows: list[dict[str, Any]],
    *,
    tables: dict[str, list[dict[str, Any]]] | None = None,
    prepared: dict[str, int] | None = None,
    seed: int = 0,
) -> tuple[list[Sample], list[Skip]]:
    """What the source `name` makes of rows; every sample is checked as the trainer checks it."""
    ctx = Context.for_tests(source=name, tables=tables, prepared=prepared, seed=seed)
    made = list(convert(find_source(name), rows, ctx))
    samples = [item for item in made if isinstance(item, Sample)]
    for sample in samples:
        as_record(sample)
    return samples, [item for item in made if isinstance(item, Skip)]


def as_record(sample: Sample, picture: bytes | None = None, video: bytes | None = None) -> Record:
    """The record of a sample whose pictures and videos are the given ones, through JSON and the trainer's parser."""
    data: dict[str, Any] = {"images": [f"{i}.png" for i in range(len(sample.images))]}
    if sample.video is not None:
        data["video"] = "mp4"
    if sample.variants:
        data["variants"] = sample.variants
    else:
        data["annotations"] = sample.annotations
    for field in ("weight", "weight_factor", "variant_weights", "clip"):
        if getattr(sample, field) is not None:
            data[field] = getattr(sample, field)
    if sample.sampling:
        data["sampling"] = sample.sampling
    if sample.subtitles:
        lines = sample.subtitles
        data["subtitles"] = (
            lines if isinstance(lines, str) else [{"start": a, "end": b, "text": words} for a, b, words in lines]
        )
    members = {f"{i}.png": picture or b"not looked at" for i in range(len(sample.images))}
    members |= {"mp4": video or b"not looked at"} if sample.video is not None else {}
    record = parse_record(f"test:{sample.key}", {**members, "json": json.dumps(data).encode()})
    sizes = ((640, 480),) * len(sample.images)
    check_usable(record, data, View(sizes, (640, 480) if sample.video is not None else None, 60.0, 25.0), Asked.NAMES)
    return record


def conversations(sample: Sample, *, stage1: bool = False, seed: int = 0) -> list[list[tuple[str, str]]]:
    """What is asked and answered when the sample is built with the tiny model's settings."""
    config = DataConfig(
        image=ImageConfig(crop_size=126, margin=2),
        video=VideoConfig(max_frames=8, max_fps=2),
        text=STAGE1 if stage1 else TextFormatConfig(),
    )
    builder = ExampleBuilder(config, Molmo2Tokenizer.load("tiny"))
    example = builder.build(as_record(sample, png(), FILM.read_bytes()), np.random.default_rng(seed))
    assert (example.loss_weights > 0).any()
    return example.info["conversations"]


def only(found: list[Any]) -> Any:
    """The one entry of a list."""
    assert len(found) == 1, found
    return found[0]


def reasons(skips: list[Skip]) -> dict[str, str]:
    """Key -> reason of every skip."""
    return {skip.key: skip.reason for skip in skips}
