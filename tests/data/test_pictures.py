"""Decoding pictures: every mode and format, turned, cut off, made to be slow; Pillow itself is the reference."""

import io
import os
import re
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, features

from molmo2_nemo.data import picture_decoder, picture_process
from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.picture_decoder import SEVERAL, TRANSPARENT, TRUNCATED, decode_here, describe
from molmo2_nemo.data.pictures import decode_image, decode_picture
from molmo2_nemo.errors import DataError

LIMITS = LimitsConfig()
QUICK = LimitsConfig(image_seconds=1.0)


def has(feature):
    """Whether Pillow was built with it; earlier versions do not know all names."""
    with warnings.catch_warnings(action="ignore"):
        return bool(features.check(feature))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def probed(data, **options):
    return decode_picture(data, limits=LIMITS, truncated="load", probe=True, **options)


# --- what they become -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_exif_orientation_is_applied(kind, orientation):
    if kind == "AVIF" and not has("avif"):
        pytest.skip("Pillow without AVIF")
    image, exif = Image.fromarray(smooth(40, 90)), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert expected.shape == ((90, 40, 3) if orientation >= 5 else (40, 90, 3))
    assert np.array_equal(decode_image(data), expected)
    found = probed(data)
    assert (found.height, found.width) == expected.shape[:2]


@pytest.mark.parametrize("size", [(1, 1), (1, 70_000), (70_000, 1), (1001, 777), (64, 1024)])
def test_pictures_of_several_strips(size):
    """Taken out of Pillow by strips, they are what NumPy makes of the whole; and they can be written to."""
    image = Image.fromarray(picture(*size))
    pixels = decode_image(encoded(image))
    assert np.array_equal(pixels, np.array(image)) and pixels.flags.writeable and pixels.flags.c_contiguous
    grey = image.convert("L")
    assert np.array_equal(decode_image(encoded(grey)), np.array(grey.convert("RGB")))


def test_broken_exif_data_do_not_cost_the_picture():
    """As in the published code, which shows it as it is stored."""
    plain = encoded(Image.fromarray(smooth(40, 90)), "JPEG")
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff"
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    assert np.array_equal(decode_image(data), decode_image(plain)) and probed(data).width == 90


@pytest.mark.parametrize(
    "mode, kind",
    [
        *((mode, "PNG") for mode in ("L", "LA", "P", "RGBA", "1")),
        *((mode, "TIFF") for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr")),
        *((mode, "JPEG") for mode in ("L", "CMYK", "YCbCr")),
        *((mode, "WEBP") for mode in ("RGBA", "P")),
        *((mode, "JPEG2000") for mode in ("L", "LA", "RGBA")),
        ("RGBA", "AVIF"),
        ("P", "GIF"),
        ("1", "BMP"),
        ("L", "PPM"),
    ],
)
def test_modes_become_rgb_as_pillow_does(mode, kind):
    if not has({"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind, "jpg")):
        pytest.skip(f"Pillow without {kind}")
    data = encoded(Image.fromarray(picture(9, 7)).convert(mode), kind)
    with Image.open(io.BytesIO(data)) as stored:
        try:
            expected = np.asarray(stored.convert("RGB"))
        except OSError:
            pytest.skip(f"this Pillow cannot read its own {kind} of {mode}")
    assert np.array_equal(decode_image(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_palette_with_transparency(kind):
    image = Image.fromarray(picture(9, 7)).convert("P")
    data = encoded(image, kind, transparency=bytes([0, 128, 255]) if kind != "GIF" else 0)
    with Image.open(io.BytesIO(data)) as stored:
        assert np.array_equal(decode_image(data), np.asarray(stored.convert("RGBA").convert("RGB")))


def tiff(values, *, bits, sample=1, photometric=1, order="<", packed=None):
    """A grey TIFF of one uncompressed strip, written by hand."""
    raw = packed if packed is not None else values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(raw)}
    tags[339] = sample
    pairs = sorted(tags.items())
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in pairs)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(raw) + len(raw) % 2)
    return head + raw + bytes(len(raw) % 2) + struct.pack(f"{order}H", len(pairs)) + entries + bytes(4)


RAMP = np.linspace(0, 1, 48).reshape(6, 8)
EIGHT = np.rint(RAMP * 255).astype(int)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize(
    "name, values, bits, sample",
    [
        ("floats to 1", RAMP.astype(np.float32), 32, 3),
        ("floats to 255", (RAMP * 255).astype(np.float32), 32, 3),
        ("floats to 65535", (RAMP * 65535).astype(np.float32), 32, 3),
        ("16 bits", (RAMP * 65535).astype(np.uint16), 16, 1),
        ("signed 16 bits", (RAMP * 32767).astype(np.int16), 16, 2),
        ("32 bits of 8", (RAMP * 255).astype(np.int32), 32, 2),
        ("32 bits of 16", (RAMP * 65535).astype(np.int32), 32, 2),
    ],
)
def test_deep_grey_keeps_its_tones(name, values, bits, sample, order, inverted):
    """Within one of 255 of what a ramp from black to white is with 8 bits; refused where Pillow does not know it."""
    data = tiff(values, bits=bits, sample=sample, photometric=0 if inverted else 1, order=order)
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        with pytest.raises(DataError, match="cannot read image"):
            decode_image(data)
        assert inverted or (order, bits, sample) == (">", 32, 1)
        return
    found = decode_image(data).astype(int)
    expected = 255 - EIGHT if inverted else EIGHT
    assert np.abs(found - expected[..., None]).max() <= 1


def test_twelve_bits():
    values = np.rint(RAMP * 4095).astype(np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1)
    found = decode_image(tiff(values, bits=12, packed=packed.astype(np.uint8).tobytes()))
    assert np.abs(found.astype(int) - EIGHT[..., None]).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_sixteen_bits_of_other_formats(kind):
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    got = decode_image(encoded(Image.fromarray(deep), kind))
    assert np.array_equal(got[..., 0], (deep // 256).astype(np.uint8))


@pytest.mark.parametrize("top", [100, 65535])
def test_dark_pictures_of_sixteen_bits_stay_dark(top):
    """Not stretched to what happens to be their largest value."""
    deep = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
    pgm = b"P5 8 8 65535\n" + deep.astype(">u2").tobytes()
    for data in (pgm, encoded(Image.fromarray(deep)), tiff(deep, bits=16)):
        assert decode_image(data).max() == top >> 8


@pytest.mark.parametrize(
    "values, sample",
    [
        (RAMP * 2 - 1, 3),
        (RAMP * 1.5, 3),
        (RAMP * 1e6, 3),
        (np.where(RAMP > 0.5, np.nan, RAMP), 3),
        (np.where(RAMP > 0.5, np.inf, RAMP), 3),
        (RAMP * 1e6, 2),
        (RAMP * 100 - 50, 2),
    ],
)
def test_tones_that_nobody_can_know_are_refused(values, sample):
    with np.errstate(invalid="ignore"):
        data = tiff(values.astype(np.float32 if sample == 3 else np.int32), bits=32, sample=sample)
    for decode in (decode_image, probed):
        with pytest.raises(DataError, match="grey values from .* cannot be told: save it with 8 or 16 bits"):
            decode(data)


def test_colours_that_need_a_white_point_are_refused():
    data = encoded(Image.fromarray(picture(9, 7)).convert("LAB"), "TIFF")
    with pytest.raises(DataError, match="save it as RGB"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_several_pictures_the_first_is_used(kind):
    if kind == "AVIF" and not has("avif"):
        pytest.skip("Pillow without AVIF")
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decode_image(data)[0, 0].astype(int) - [255, 0, 0]).max() <= 2
    assert probed(data).notes == [SEVERAL] and probed(encoded(frames[0], kind)).notes == []


def test_transparency_is_noted_where_something_is_transparent():
    image = Image.new("RGBA", (9, 7), (1, 2, 3, 255))
    assert probed(encoded(image)).notes == []
    image.putpixel((3, 3), (0, 0, 0, 0))
    for kind in ("PNG", "WEBP", "TIFF"):
        assert probed(encoded(image, kind)).notes == [TRANSPARENT]
    palette = Image.fromarray(picture(9, 7)).convert("P")
    assert probed(encoded(palette, transparency=palette.getpixel((3, 3)))).notes == [TRANSPARENT]
    assert probed(encoded(Image.new("RGB", (9, 7), "red"), transparency=(255, 0, 0))).notes == [TRANSPARENT]


# --- cut off --------------------------------------------------------------------------------------------------------


def published(data):
    """What the published code makes of a picture: Pillow with its switch for truncated files, RGB, upright."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            return np.array(ImageOps.exif_transpose(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error):
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


NEWER = {"AVIF": "avif", "JPEG2000": "jpg_2000"}


@pytest.mark.parametrize(
    "kind", ["JPEG", "progressive", "PNG", "GIF", "WEBP", "BMP", "TIFF", "deflated TIFF", "PPM", "AVIF", "JPEG2000"]
)
def test_cut_pictures_are_those_of_the_published_code(kind):
    if kind in NEWER and not has(NEWER[kind]):
        pytest.skip(f"Pillow without {kind}")
    options = {"progressive": {"progressive": True}, "deflated TIFF": {"compression": "tiff_adobe_deflate"}}.get(
        kind, {}
    )
    name = {"progressive": "JPEG", "deflated TIFF": "TIFF"}.get(kind, kind)
    data = encoded(Image.fromarray(smooth(150, 200)), name, **options)
    loaded = 0
    for cut in np.linspace(1, len(data), 40).astype(int):
        expected, part = published(data[:cut]), data[:cut]
        if expected is None:
            with pytest.raises(DataError):
                decode_image(part)
            continue
        notes: list[str] = []
        assert np.array_equal(decode_image(part, notes=notes), expected)
        whole = np.array_equal(expected, decode_image(data))
        assert notes == [TRUNCATED] or (not notes and whole)
        assert probed(part).notes == notes
        if notes:
            loaded += 1
            with pytest.raises(DataError, match="cannot read image"):
                decode_image(part, truncated="skip")
    assert loaded > 0 or kind in ("WEBP", "deflated TIFF", *NEWER)


def test_damage_inside_is_handled_like_the_published_code():
    good, loaded = encoded(Image.fromarray(smooth(150, 200))), 0
    for place in np.linspace(40, len(good) - 20, 40).astype(int):
        data = bytearray(good)
        data[place] ^= 0x10
        expected, notes = published(bytes(data)), []
        if expected is None:
            with pytest.raises(DataError):
                decode_image(bytes(data))
            continue
        assert np.array_equal(decode_image(bytes(data), notes=notes), expected)
        loaded += notes == [TRUNCATED]
    assert loaded > 5 and not ImageFile.LOAD_TRUNCATED_IMAGES


# --- limits ---------------------------------------------------------------------------------------------------------


def png_header(width, height):
    """A PNG that claims to be huge; Pillow reads sizes before pixels."""
    small = encoded(Image.new("L", (1, 1)))
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return small[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + small[33:]


@pytest.mark.parametrize("size", [(50_000, 50_000), (9_000, 8_000)])
def test_huge_pictures_are_refused_unread(size):
    with pytest.raises(ValueError, match="at most 64000000 pixels"):
        decode_image(png_header(*size))


def many_scans(side, scans):
    """A JPEG of one grey square whose last scan comes again and again, empty: ten bytes a scan."""
    data = encoded(Image.new("L", (side, side), 77), "JPEG", progressive=True)
    return data[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x01" * scans + b"\xff\xd9"


def large_tiles(height=1_000_000, across=65536, down=16, stored=2**20):
    """A TIFF one pixel wide, of tiles of a megabyte, which are all the same one: 60 GB come out of half a megabyte."""
    tile, count = zlib.compress(bytes(stored), 9), height // down
    tags = {256: 1, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 284: 1, 322: across, 323: down}
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    entries.append(struct.pack("<HHII", 324, 4, count, start + len(tile)))
    entries.append(struct.pack("<HHII", 325, 4, count, start + len(tile) + 4 * count))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    lists = struct.pack("<I", start) * count + struct.pack("<I", len(tile)) * count
    return b"II*\0" + struct.pack("<I", 8) + directory + tile + lists


def tiny_chunks(count=1_500_000):
    """A PNG of empty chunks, each of which Pillow's own Python reads."""
    whole = encoded(Image.new("L", (8, 8)))
    return whole[:33] + (bytes(4) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))) * count + whole[33:]


def run_lengths(side=7900):
    """A BMP of runs of 15 pixels, which Pillow unpacks in Python: seconds."""
    runs = (b"\x0f\x00" * (side // 15 + 1) + b"\0\0") * side
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + info + bytes(1024) + runs


BOMBS = {
    "scans": lambda: many_scans(4000, 100_000),
    "tiles": large_tiles,
    "chunks": tiny_chunks,
    "runs": run_lengths,
    "digits": lambda: b"P2 7900 7900 255\n" + b"1 " * 7900**2,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_slow_pictures_are_stopped(kind):
    """Some would take minutes to hours. Afterwards the next picture is decoded as ever."""
    bomb = BOMBS[kind]()
    began = time.process_time()
    for decode in (
        decode_image,
        lambda data, limits: decode_picture(data, limits=limits, truncated="load", probe=True),
    ):
        with pytest.raises(DataError, match=r"more than 1 s of processor time \(data.limits.image_seconds\)"):
            decode(bomb, limits=QUICK)
    assert time.process_time() - began < 30  # of this process; a decoder that cannot be stopped would take minutes
    data = encoded(Image.fromarray(picture(30, 20)), "TIFF", compression="tiff_lzw")
    assert np.array_equal(decode_image(data, limits=QUICK), picture(30, 20))


def test_one_tile_larger_than_memory():
    tile = large_tiles(2**14, 2**19, 2**14)  # it says 8 GB
    with pytest.raises(DataError, match="cannot read image"):
        decode_image(tile)


# --- the other process ----------------------------------------------------------------------------------------------

DEFLATED = encoded(Image.fromarray(picture(30, 20)), "TIFF", compression="tiff_adobe_deflate")


def test_the_same_pixels_and_errors_as_here():
    for data in (DEFLATED, DEFLATED[:-900], encoded(Image.fromarray(smooth(40, 50)), "TIFF", compression="jpeg")):
        try:
            here = decode_here(data, limits=LIMITS, truncated="load")
        except OSError:
            with pytest.raises(DataError, match="cannot read image of"):
                decode_image(data)
            continue
        apart = picture_process.decode_apart(data, limits=LIMITS, truncated="load")
        assert (
            np.array_equal(here.pixels, apart.pixels) and here.pixels.flags.writeable and apart.pixels.flags.writeable
        )
        assert (here.width, here.height, here.format, here.notes) == (
            apart.width,
            apart.height,
            apart.format,
            apart.notes,
        )


def test_threads_and_forks_each_get_their_answer():
    pictures = [picture(30 + i, 20, i) for i in range(12)]
    files = [encoded(Image.fromarray(p), "TIFF", compression="tiff_lzw") for p in pictures]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(decode_image, files), pictures, strict=True):
            assert np.array_equal(found, expected)
    child = os.fork()
    if child == 0:
        same = np.array_equal(decode_image(files[0]), pictures[0])
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(decode_image(files[1]), pictures[1])


def test_a_decoder_that_crashes_costs_one_picture():
    decode_image(DEFLATED)
    process = picture_process._process
    process.kill()
    process.wait()
    assert np.array_equal(decode_image(DEFLATED), picture(30, 20))  # was idle: another takes its place
    stopped = picture_process._process
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(decode_image, large_tiles())
        time.sleep(0.5)
        stopped.kill()
        with pytest.raises(DataError, match="ended with SIGKILL; convert it to JPEG or PNG"):
            waiting.result()
    assert np.array_equal(decode_image(DEFLATED), picture(30, 20))


# --- what is no picture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "empty"),
        (b"not a picture", "of no known format"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"\n  <html lang=en>", "an HTML page"),
        (b'{"error": "not found"}', "text"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "draw it as PNG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0", r"a video \(MP4"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "HEIC; convert it"),
        (b"\x1aE\xdf\xa3\x01\0\0\0", "a video"),
        (b"%PDF-1.7", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (encoded(Image.fromarray(picture(64, 64)), "JPEG")[:300], "starts with ffd8ff"),
    ],
)
def test_files_that_are_no_pictures(data, words):
    for decode in (decode_image, probed):
        with pytest.raises(DataError, match=f"cannot read image of {len(data)} bytes.*{words}"):
            decode(data)


@pytest.mark.parametrize("feature, kind", [("avif", "AVIF"), ("jpg_2000", "JPEG2000")])
def test_newer_formats_without_pillows_part(feature, kind, monkeypatch):
    """What is said where Pillow was built without it: here its plugin is taken away."""
    if not has(feature):
        pytest.skip(f"Pillow without {kind} cannot make one")
    data = encoded(Image.fromarray(smooth(40, 50)), kind)
    assert np.abs(decode_image(data).astype(int) - smooth(40, 50)).mean() < 20
    monkeypatch.setattr(picture_decoder, "FORMATS", [name for name in picture_decoder.FORMATS if name != kind])
    with pytest.raises(Image.UnidentifiedImageError) as caught:
        decode_here(data, limits=LIMITS, truncated="load")
    assert re.search("built without.*convert it to JPEG or PNG", describe(data, caught.value, LIMITS))
    missing = OSError("decoder jpeg2k not available")
    assert "convert it to JPEG or PNG" in describe(data, missing, LIMITS)
