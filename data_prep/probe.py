"""Looking at media: that training can read them, their types, sizes and durations."""

from __future__ import annotations

from pathlib import Path

from data_prep.media_kinds import ENDS_EARLY, ENDS_INSIDE, MediaError, StillImage, Video
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.known_files import known_instead_of_video
from molmo2_nemo.errors import DataError

FORMAT_SUFFIX = {
    **{"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"},
    **{"PPM": "ppm", "AVIF": "avif", "JPEG2000": "jp2"},
}
# Endings of one kind of container; another ending lies about the kind, and is replaced by that of the content.
FAMILIES = {"mp4": ("mp4", "m4v", "mov", "3gp"), "mkv": ("mkv", "webm"), "mpg": ("mpg", "mpeg")}


def probe_image(data: bytes, config: DataConfig | None = None) -> StillImage:
    """The size and type of an image, found by decoding it (JPEG at an eighth of its size, which still reads every
    byte).

    Args:
        config: settings of the training that it is for.
    Raises:
        MediaError: not an image of a type that training reads, more pixels or seconds than its limits, or cut off where
            `image.truncated` is skip.
    """
    from molmo2_nemo.data.pictures import decode_picture

    config = config or DataConfig()
    try:
        found = decode_picture(data, limits=config.limits, truncated=config.image.truncated, probe=True)
    except DataError as error:
        reason = "too large" if "data.limits.pixels" in str(error) else "image cannot be decoded"
        raise MediaError(reason, str(error)[:300]) from None
    kind = FORMAT_SUFFIX.get(found.format)
    if kind is None:
        raise MediaError("image cannot be decoded", f"of the type {found.format}, which training does not read")
    return StillImage(data, kind, found.width, found.height, tuple(found.notes))


def probe_video(data: bytes | Path, suffix: str | None, config: DataConfig | None = None) -> Video:
    """Scan a video's packets and decode its first frame.

    Raises:
        MediaError: not a video, damaged at the start, or too long.
    """
    from molmo2_nemo.data.video.cut_off import is_cut_off
    from molmo2_nemo.data.video.read import inspect_video

    try:
        info = inspect_video(data, (config or DataConfig()).limits)
    except DataError as error:
        known = known_instead_of_video(_head(data))
        hint = "" if known or not is_cut_off(data) else "; the file is cut off: download it again"
        named = "" if isinstance(data, bytes) else f" {data}"  # the path on this machine; others say which film it is
        detail = f"it is {known}" if known else str(error).replace(named, "", 1)
        raise MediaError("video cannot be decoded", detail[: 300 - len(hint)] + hint) from None
    kind = suffix if suffix in FAMILIES.get(info.suffix, ()) else info.suffix
    notes = (ENDS_EARLY,) if info.stated is not None else (ENDS_INSIDE,) if is_cut_off(data) else ()
    measures = info.duration, info.fps, info.frames, info.size, info.gop
    return Video(data, kind or info.suffix, *measures, notes=notes, stated=info.stated)


def _head(data: bytes | Path) -> bytes:
    if isinstance(data, bytes):
        return data[:1024]
    with data.open("rb") as file:
        return file.read(1024)
