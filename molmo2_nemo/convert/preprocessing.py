"""How a checkpoint's images and videos are prepared: read from the folder it came from, else derived from its model."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from molmo2_nemo.convert.hf_fields import FLAG, POSITIVE, ROWS, Kind, is_integer, is_number, require
from molmo2_nemo.convert.json_files import is_present, parse_object
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.image import TileGeometry
from molmo2_nemo.errors import ConversionError, UserError
from molmo2_nemo.model.config import Molmo2Config

# A processor's file by itself (transformers 4, and exports), and its key in processor_config.json (transformers 5).
IMAGE_FILE, VIDEO_FILE, PROCESSOR_FILE = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
PAIR = Kind(
    lambda value: isinstance(value, list) and len(value) == 2 and is_integer(value[0]) and value[0] == value[1],
    "a list of two equal integers",
)
PAIRS = ("overlap_margins", "pooling_size")  # settings written as [side, side]
MAX_CROPS, MAX_FRAMES, MAX_FPS = 1000, 10_000, 1000  # far more than any sequence holds
RATE = Kind(lambda value: POSITIVE.fits(value) and value <= MAX_FPS, f"a number above 0, at most {MAX_FPS}")
FRAME_TOKENS = "use_frame_special_tokens"  # in processor_config.json
# Preparation that this package has no settings for, as published.
PIXELS = {
    "do_resize": True,
    "resample": 2,  # bilinear
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}
SAMPLING = {"do_sample_frames": True, "sampling_fps": 2, "frame_sample_mode": "uniform_last_frame"}
PROCESSOR_FLAGS = {
    "image_use_col_tokens": True,
    "use_single_crop_col_tokens": False,
    "use_single_crop_start_token": True,
    "video_use_col_tokens": False,
}


def default_data(model_config: Molmo2Config) -> DataConfig:
    """Published preprocessing; a smaller crop keeps the published share of its side for margins."""
    vision = model_config.vision
    margin = 4 if vision.grid >= 27 else max(int(vision.grid > 2), vision.grid // 4)
    crop = vision.grid * vision.patch_size
    return DataConfig(image=ImageConfig(crop_size=crop, patch_size=vision.patch_size, margin=margin))


def run_data(run: dict[str, Any]) -> DataConfig | None:
    """The image and video settings of a run; None if they are unknown.

    Args:
        run: content of its config.yaml.
    """
    data = run.get("data")
    return with_settings(DataConfig(), data) if isinstance(data, dict) else None


def with_settings(data: DataConfig, settings: dict[str, Any]) -> DataConfig:
    """`data` with the `image` and `video` settings named; unknown names are left out."""

    def known(kind: type, values: Any) -> dict[str, Any]:
        names = {field.name for field in fields(kind)}
        return {key: value for key, value in (values or {}).items() if key in names}

    image = replace(data.image, **known(ImageConfig, settings.get("image")))
    return replace(data, image=image, video=replace(data.video, **known(VideoConfig, settings.get("video"))))


def read_processors(folder: Path, model_config: Molmo2Config) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What the processor files of a Hugging Face folder say otherwise than `default_data`, under our names.

    Returns:
        "image" and "video" -> settings, empty where nothing differs or there are no such files; what the files ask for
        and this package does otherwise, one sentence each.

    Raises:
        ConversionError: a file is damaged, or describes preprocessing that does not fit the model.
    """
    together, default = read(folder / PROCESSOR_FILE), default_data(model_config)
    differing, notes = {}, fixed_notes(together, PROCESSOR_FLAGS, PROCESSOR_FILE)
    for part, (file, key) in {
        "image": (IMAGE_FILE, "image_processor"),
        "video": (VIDEO_FILE, "video_processor"),
    }.items():
        found, where = read(folder / file), file
        if not found:
            found, where = part_of(together, key, folder), f"{PROCESSOR_FILE}: {key}"
        settings = values(found, part, model_config, f"{folder / where}")
        if part == "video" and together.get(FRAME_TOKENS) is not None:
            require(f"{folder / PROCESSOR_FILE}: {FRAME_TOKENS}", together[FRAME_TOKENS], FLAG)
            settings["frame_tokens"] = together[FRAME_TOKENS]
        ours = getattr(default, part)
        differing[part] = {name: value for name, value in settings.items() if value != getattr(ours, name)}
        if "margin" in differing[part]:
            check_margin(with_settings(default, differing).image, f"{folder / where}")
        notes += fixed_notes(found, fixed_settings(default.image, part), where)
    return differing, notes


def recorded_data(settings: Any, model_config: Molmo2Config, where: str) -> DataConfig:
    """`default_data` with the settings that an import recorded.

    Raises:
        ConversionError: they are not what `read_processors` returns, or do not fit the model.
    """
    parts = (settings or {}).values() if isinstance(settings or {}, dict) else [settings]
    if not all(isinstance(part, dict) for part in parts):
        raise ConversionError(f"{where} is damaged: preprocessing is {settings!r:.60}")
    for part, kinds in setting_kinds(model_config).items():
        for name, (_, kind) in kinds.items():
            value = (settings or {}).get(part, {}).get(name)
            if value is not None:
                require(f"{where}: preprocessing.{part}.{name}", value, kind)
    data = with_settings(default_data(model_config), settings or {})
    check_margin(data.image, where)
    return data


def check_margin(image: ImageConfig, where: str) -> None:
    """Raises:
    ConversionError: no room is left between the margins of a tile."""
    try:
        TileGeometry.of(image)
    except UserError as error:
        raise ConversionError(f"{where}: {error}") from error


def setting_kinds(model_config: Molmo2Config) -> dict[str, dict[str, tuple[str, Kind]]]:
    """For "image" and "video": our name of a setting -> its name in a processor's file, and the values that make
    sense."""
    pool = ("pooling_size", whole(1, model_config.vision.grid))
    return {
        "image": {"max_crops": ("max_crops", whole(1, MAX_CROPS)), "margin": ("overlap_margins", ROWS), "pool": pool},
        "video": {
            "max_frames": ("num_frames", whole(1, MAX_FRAMES)),
            "max_fps": ("max_fps", RATE),
            "pool": pool,
            "frame_tokens": (FRAME_TOKENS, FLAG),
        },
    }


def whole(low: int, high: int) -> Kind:
    return Kind(lambda value: is_integer(value) and low <= value <= high, f"an integer from {low} to {high}")


def values(found: dict[str, Any], part: str, model_config: Molmo2Config, where: str) -> dict[str, Any]:
    """Settings under our names from those of a processor's file; of two equal numbers, one."""
    settings = {}
    for ours, (theirs, kind) in setting_kinds(model_config)[part].items():
        value = found.get(theirs)
        if value is None:
            continue
        if theirs in PAIRS:
            require(f"{where}: {theirs}", value, PAIR)
            kind = twice(kind)
        require(f"{where}: {theirs}", value, kind)
        settings[ours] = value[0] if theirs in PAIRS else value
    return settings


def twice(kind: Kind) -> Kind:
    """A list of two of the same."""
    return Kind(lambda value: kind.fits(value[0]), f"twice {kind.title}")


def fixed_settings(image: ImageConfig, part: str) -> dict[str, Any]:
    """What a processor's file may say and this package does in one way only."""
    side = image.crop_size
    fixed = PIXELS | {"size": {"height": side, "width": side}, "patch_size": image.patch_size}
    return fixed | SAMPLING if part == "video" else fixed


def fixed_notes(found: dict[str, Any], fixed: dict[str, Any], where: str) -> list[str]:
    """A sentence for each setting that differs from the one way there is; null says nothing."""
    return [
        f"{where}: {name} is {found[name]!r:.60} and is not kept, images and videos are prepared with {value!r}"
        for name, value in fixed.items()
        if found.get(name) is not None and not same(found[name], value)
    ]


def same(found: Any, value: Any) -> bool:
    """Whether a file's value is ours: 1 is no flag, and numbers are equal to six digits."""
    if isinstance(value, list):
        return isinstance(found, list) and len(found) == len(value) and all(map(same, found, value))
    if isinstance(value, dict) and isinstance(found, dict):
        return found.keys() == value.keys() and all(same(found[key], value[key]) for key in value)
    if is_number(value) and is_number(found):
        return math.isclose(found, value, rel_tol=1e-6)
    return type(found) is type(value) and found == value


def part_of(found: dict[str, Any], key: str, folder: Path) -> dict[str, Any]:
    """An object inside processor_config.json."""
    value = found.get(key) or {}
    if not isinstance(value, dict):
        raise ConversionError(f"{folder / PROCESSOR_FILE}: {key} is a {type(value).__name__}, expected an object")
    return value


def read(path: Path) -> dict[str, Any]:
    """The content of one file, empty where there is none."""
    return parse_object(path.read_bytes(), str(path)) if is_present(path) else {}
