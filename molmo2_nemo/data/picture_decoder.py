"""One picture decoded in this process: modes, tones, orientation, cut files; see pictures.py."""

from __future__ import annotations

import io
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.known_files import known_as
from molmo2_nemo.errors import DataError

# Only formats that decode in-process from bytes: none that start a program (EPS) or read other files.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"]
if find_spec("PIL.AvifImagePlugin") is not None:  # Pillow 11.3
    FORMATS.append("AVIF")
BLOCK = 4096  # bytes between two looks at the time where many scans over the picture fit into the usual 64 KiB
START_OF_SCAN = b"\xff\xda"  # two bytes that a JPEG's pixels do not contain
TRUNCATED = "cut off or damaged inside: loaded as far as it goes"
TRANSPARENT = "partly transparent: transparency is dropped, what is stored behind it shows"
SEVERAL = "of several frames or pages: only the first is used"
ORIENTATION = 0x0112  # EXIF; from 5 on width and height change places
TURNED = range(2, 9)  # its values for pictures that are not stored upright
STRIP = 2**18  # bytes of a picture that are taken out of Pillow at a time: they stay in the processor's cache
Truncated = Literal["load", "skip"]
_tolerant = threading.Lock()  # held while Pillow's global switch is set


@dataclass(slots=True)
class Picture:
    """A decoded picture, and what was done to it that its owner may not expect."""

    pixels: np.ndarray  # uint8 [H, W, 3]; as small as [0, 0, 3] where only its size was asked for
    width: int  # upright
    height: int
    format: str  # of FORMATS
    notes: list[str] = field(default_factory=list)  # TRUNCATED, TRANSPARENT, SEVERAL


def decode_here(data: bytes, *, limits: LimitsConfig, truncated: Truncated, probe: bool = False) -> Picture:
    """`decode_picture` in this process, without a bound on the time of a decoder that takes the file in one call.

    Raises:
        DataError, and whatever Pillow raises for broken files.
    """
    source = Source(data, limits.image_seconds)
    try:
        return _decode(source, limits, probe)
    except (DataError, UnidentifiedImageError, Image.DecompressionBombError):
        raise
    except Exception:
        if truncated != "load":
            raise
        source.seek(0)
        with _tolerance():
            picture = _decode(source, limits, probe)
        picture.notes.append(TRUNCATED)
        return picture


def _decode(source: Source, limits: LimitsConfig, probe: bool) -> Picture:
    with opened(source, limits) as image:
        kind, (width, height) = image.format or "", image.size
        if probe:
            image.draft(image.mode, (max(width // 8, 1), max(height // 8, 1)))
        image.load()
        notes = _notes(image) if probe else []
        turned = _upright(image)
        if not probe or kind not in ("JPEG", "MPO"):
            width, height = turned.size
        elif _sideways(image):  # the upright image is a small one
            width, height = height, width
        plain = probe and image.mode in ("L", "RGB")
        pixels = np.zeros((0, 0, 3), np.uint8) if plain else _array(_to_rgb(turned, image))
        source.check()
        return Picture(pixels[:0, :0] if probe else pixels, width, height, kind, notes)


class Source(io.BytesIO):
    """An encoded picture that stops being read when too much processor time went by since it was made. Wall time
    would make the result depend on other load."""

    def __init__(self, data: bytes, seconds: float):
        super().__init__(data)
        self.seconds = seconds
        self._end = time.thread_time() + seconds

    def read(self, size: int | None = -1) -> bytes:
        self.check()
        return super().read(size)

    def check(self) -> None:
        if time.thread_time() > self._end:
            raise DataError(too_slow(self.seconds))


def too_slow(seconds: float) -> str:
    return f"reading the image took more than {seconds:g} s of processor time (data.limits.image_seconds)"


@contextmanager
def opened(source: io.BytesIO, limits: LimitsConfig) -> Iterator[Any]:
    """The picture, opened but not decoded, and of no more pixels than allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of size, where the limit is another; of EXIF data and tags that are broken
        with Image.open(source, formats=FORMATS) as image:
            yield _checked(image, source, limits)


def _checked(image: Any, source: io.BytesIO, limits: LimitsConfig) -> Any:
    width, height = image.size
    if width * height > limits.pixels:
        raise DataError(
            f"image of {width} x {height} pixels; at most {limits.pixels} pixels are read (data.limits.pixels)"
        )
    if image.format in ("JPEG", "MPO") and source.getvalue().count(START_OF_SCAN) > 2:
        image.decodermaxblock = BLOCK
    return image


@contextmanager
def _tolerance() -> Iterator[None]:
    """Pillow loads what it can of broken pictures. Its switch is global; other threads may get that too."""
    with _tolerant:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _sideways(image: Image.Image) -> bool:
    """Whether width and height change places when the image is turned as its EXIF data say."""
    try:
        return (image.getexif().get(ORIENTATION) or 1) >= 5
    except DataError:
        raise
    except Exception:
        return False


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; as it is stored where they cannot be read, like the published code.

    The same image where it need not be turned: Pillow's copy of it takes longer than its decoding.
    """
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) in TURNED else image
    except DataError:
        raise
    except Exception:
        return image


def _notes(image: Image.Image) -> list[str]:
    notes = []
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min(initial=255) < 255:
            notes.append(TRANSPARENT)
    if image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append(SEVERAL)
    return notes


def _to_rgb(image: Image.Image, opened: Image.Image) -> Image.Image:
    """RGB as Pillow converts it, except that deep grey keeps its tones instead of clipping to white.

    Args:
        opened: the same image before it was turned, with its format and tags.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_tones(np.asarray(image), opened)).convert("RGB")
    if image.mode == "LAB":
        raise DataError("image in L*a*b* colours, whose conversion depends on a white point; save it as RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _array(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image, uint8 [H, W, 3], which torch can write to.

    By strips: `np.array` of a whole image goes through memory three times.
    """
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(STRIP // max(4 * width, 1), 1)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels


def _tones(values: np.ndarray, opened: Image.Image) -> np.ndarray:
    """Grey values of more than 8 bits as 8 bits: uint8 [H, W].

    Raises:
        DataError: values of which nobody can know what is black and what is white.
    """
    tags = getattr(opened, "tag_v2", {})
    bits, kind = (np.max(tags.get(tag, default)) for tag, default in ((258, 16), (339, 1)))
    if values.dtype.kind == "f":
        grey = _float_tones(values)
    elif opened.mode.startswith("I;16") or opened.format in ("PNG", "PPM"):  # unsigned, 16 bits or (TIFF) fewer
        grey = np.clip(values.astype(np.int64) >> (min(int(bits), 16) - 8), 0, 255).astype(np.uint8)
    else:
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        if low < 0 or high > 65535:
            raise DataError(f"grey values from {low} to {high}; {ASK}")
        white = 255 if high <= 255 else 32767 if (bits, kind) == (16, 2) else 65535
        grey = (values * (255.0 / white)).astype(np.uint8)
    return 255 - grey if tags.get(262) == 0 else grey  # 262: photometric interpretation, 0: 0 is white


ASK = "what is black and what is white cannot be told: save it with 8 or 16 bits"


def _float_tones(values: np.ndarray) -> np.ndarray:
    """0..1 as most programs write; otherwise 0..255 or 0..65535, told apart by the largest value."""
    low, high = values.min(initial=0), values.max(initial=0)
    if not low >= 0 or not high <= 65535 or 1 < high < 16:
        raise DataError(f"grey values from {low:g} to {high:g} as floating-point numbers; {ASK}")
    if high <= 1:
        return np.rint(values * 255.0).astype(np.uint8)
    return (values * (1.0 if high <= 255 else 255.0 / 65535)).astype(np.uint8)


def describe(data: bytes, error: Exception, limits: LimitsConfig) -> str:
    """What is wrong with a picture that cannot be decoded."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"image too large, at most {limits.pixels} pixels (data.limits.pixels): {error}"
    unknown = isinstance(error, UnidentifiedImageError)
    what = known_as(data) if unknown or "not available" in str(error) else ""
    why = f"it is {what}" if what else "of no known format" if unknown else error
    return f"cannot read image of {len(data)} bytes (starts with {data[:8].hex() or 'nothing'}): {why or 'no memory'}"
