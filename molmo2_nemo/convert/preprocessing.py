"""How a checkpoint's images and videos are prepared: read from the folder it came from, else derived from its model."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from molmo2_nemo.convert.hf_fields import COUNT, POSITIVE, Kind, is_integer, require
from molmo2_nemo.convert.json_files import parse_object
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
    lambda value: isinstance(value, list) and len(value) == 2 and is_integer(value[0]) and value[0] == value[1] >= 0,
    "a list of two equal integers",
)


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


def read_processors(folder: Path, model_config: Molmo2Config) -> dict[str, dict[str, Any]]:
    """What the processor files of a Hugging Face folder say otherwise than `default_data`, under our names.

    Returns:
        "image" and "video" -> settings, empty where nothing differs or there are no such files.

    Raises:
        ConversionError: a file is damaged, or describes preprocessing that does not fit the model.
    """
    together = read(folder / PROCESSOR_FILE)
    image = read(folder / IMAGE_FILE) or part(together, "image_processor", folder)
    video = read(folder / VIDEO_FILE) or part(together, "video_processor", folder)
    found = {
        "image": values(
            image,
            {"max_crops": ("max_crops", COUNT), "margin": ("overlap_margins", PAIR), "pool": ("pooling_size", PAIR)},
            str(folder / IMAGE_FILE),
        ),
        "video": values(
            video,
            {
                "max_frames": ("num_frames", COUNT),
                "max_fps": ("max_fps", POSITIVE),
                "pool": ("pooling_size", PAIR),
            },
            str(folder / VIDEO_FILE),
        ),
    }
    default = default_data(model_config)
    differing = {
        name: {key: value for key, value in settings.items() if value != getattr(getattr(default, name), key)}
        for name, settings in found.items()
    }
    try:
        if "margin" in differing["image"]:
            TileGeometry.of(with_settings(default, differing).image)
    except UserError as error:
        raise ConversionError(f"{folder / IMAGE_FILE}: {error}") from error
    return differing


def values(found: dict[str, Any], wanted: dict[str, tuple[str, Kind]], where: str) -> dict[str, Any]:
    """Settings under our names from those of a processor's file; of two equal numbers, one."""
    settings = {}
    for ours, (theirs, kind) in wanted.items():
        value = found.get(theirs)
        if value is not None:
            require(f"{where}: {theirs}", value, kind)
            settings[ours] = value[0] if kind is PAIR else value
    return settings


def part(found: dict[str, Any], key: str, folder: Path) -> dict[str, Any]:
    """An object inside processor_config.json."""
    value = found.get(key) or {}
    if not isinstance(value, dict):
        raise ConversionError(f"{folder / PROCESSOR_FILE}: {key} is a {type(value).__name__}, expected an object")
    return value


def read(path: Path) -> dict[str, Any]:
    """The content of one file, empty where there is none."""
    return parse_object(path.read_bytes(), str(path)) if path.is_file() else {}
