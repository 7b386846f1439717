"""The size of an image from its header is that of its decoded pixels, and the headers of most are enough."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.image_size import image_size
from molmo2_nemo.data.pictures import decode_image
from molmo2_nemo.errors import DataError

LIMITS = LimitsConfig()
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def encoded(mode, kind, orientation=None, notes=None):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image, file, options = Image.fromarray(pixels).convert(mode), io.BytesIO(), {}
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    if notes:
        options["pnginfo"] = notes
    image.save(file, kind, **options)
    return file.getvalue()


def no_decoding(data):
    raise AssertionError("the header would have done")


CASES = [
    *itertools.product(("RGB", "L", "CMYK"), ("JPEG",), (None, *range(1, 9))),
    *itertools.product(("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), ("PNG",), (None,)),
    *itertools.product(("RGB", "RGBA"), ("WEBP",), (None, 1, 6, 8)),
    *itertools.product(("RGB", "L"), ("BMP", "PPM", "GIF"), (None,)),
]


@pytest.mark.parametrize("mode, kind, orientation", CASES)
def test_from_the_header(mode, kind, orientation):
    data = encoded(mode, kind, orientation)
    pixels = decode_image(data)
    assert image_size(data, no_decoding, LIMITS) == (pixels.shape[1], pixels.shape[0])
    assert (pixels.shape[0] > pixels.shape[1]) == (orientation in (5, 6, 7, 8))


def xmp_png(orientation):
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", XMP.format(orientation), zip=True)
    return encoded("RGB", "PNG", notes=notes)


@pytest.mark.parametrize(
    "data",
    [
        *(encoded("RGB", "PNG", orientation) for orientation in (1, 3, 6)),
        *(xmp_png(orientation) for orientation in (1, 6)),
        *(encoded("RGB", "TIFF", orientation) for orientation in (1, 6)),
    ],
)
def test_where_the_header_may_not_say_all(data):
    pixels = decode_image(data)
    assert image_size(data, decode_image, LIMITS) == (pixels.shape[1], pixels.shape[0])


def test_an_animation_has_the_size_of_its_first_frame():
    frames, file = [Image.new("RGB", (50, 30), colour) for colour in ("red", "blue")], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert image_size(file.getvalue(), no_decoding, LIMITS) == (50, 30)


@pytest.mark.parametrize("data", [b"", b"no picture", encoded("RGB", "JPEG")[:40]])
def test_what_is_no_image_is_refused_in_the_words_of_decoding(data):
    with pytest.raises(DataError, match="cannot read image of"):
        image_size(data, decode_image, LIMITS)


def test_too_many_pixels():
    limits = LimitsConfig(pixels=100)
    with pytest.raises(DataError, match="60 x 40 pixels; at most 100"):
        image_size(encoded("RGB", "JPEG"), lambda data: decode_image(data, limits=limits), limits)
