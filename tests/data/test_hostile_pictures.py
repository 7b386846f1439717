"""Pictures made to be odd: many frames and pages, bombs in pixels and in metadata, files of other kinds, extreme
shapes. Each is read as docs/data.md says or refused in one clear line, alike by decoding, by `molmo2 prepare` and in
training."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import DataConfig, LimitsConfig, SourceConfig
from molmo2_nemo.data.picture_decoder import SEVERAL, TRANSPARENT, TRUNCATED
from molmo2_nemo.data.pictures import decode_image, decode_picture
from molmo2_nemo.data.reader import ExampleReader, default_builder
from molmo2_nemo.errors import DataError
from tests.data.test_pictures import encoded, has, picture, smooth

LIMITS = LimitsConfig(image_seconds=20.0)
SMALL = encoded(Image.fromarray(picture(8, 9)))
ZEROS = zlib.compress(bytes(200 * 2**20), 9)  # 200 MB in 200 kB


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(*chunks):
    return SMALL[:33] + b"".join(chunks) + SMALL[33:]


def frames(kind, count=60, **options):
    more = [Image.fromarray(picture(32, 40, i)) for i in range(1, count)]
    return encoded(Image.fromarray(picture(32, 40)), kind, save_all=True, append_images=more, **options)


def directory(following, width=9, height=8, packing=1, offset=0, count=72, rows=None):
    """A TIFF's directory of one strip of grey pixels; `following`: where the next one is, 0: nowhere."""
    tags = {256: width, 257: height, 258: 8, 259: packing, 262: 1, 273: offset, 277: 1, 278: rows or height, 279: count}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


def tiff(following=0, data=b"", **tags):
    head = b"II*\0" + struct.pack("<I", 8)
    return head + directory(following, offset=8 + len(directory(0)), **tags) + data


def pages(count):
    """A TIFF of that many directories, each of which names the next."""
    size = len(directory(0))
    chain = b"".join(directory(8 + size * (i + 1) if i < count - 1 else 0) for i in range(count))
    return b"II*\0" + struct.pack("<I", 8) + chain


def wide_jp2():
    """A JPEG 2000 whose headers say 50,000 x 50,000."""
    data = bytearray(encoded(Image.fromarray(smooth(40, 50)), "JPEG2000"))
    for place, skipped in ((data.index(b"ihdr"), 4), (data.index(b"\xff\x51"), 6)):
        data[place + skipped : place + skipped + 8] = struct.pack(">II", 50_000, 50_000)
    return bytes(data)


def wide_gif():
    screen = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    return screen + b"\x2c" + struct.pack("<HHHHB", 0, 0, 4, 4, 0) + b"\x02\x02\x4c\x01\0;"


def see_through_palette():
    image = Image.new("P", (9, 8))
    image.putpalette([255, 0, 0, 0, 255, 0])
    return encoded(image, transparency=0)


PIXELS = 7900 * 8000
READ = {  # kind: the file, (width, height), what is noted
    "avif of many frames": (lambda: frames("AVIF", 20, speed=10), (40, 32), [SEVERAL]),
    "webp of many frames": (lambda: frames("WEBP"), (40, 32), [SEVERAL]),
    "gif of many frames": (lambda: frames("GIF"), (40, 32), [SEVERAL]),
    "tiff of many pages": (lambda: frames("TIFF"), (40, 32), [SEVERAL]),
    "tiff of endless pages": (lambda: pages(50_000), (9, 8), [SEVERAL]),
    "tiff that is its own next page": (lambda: tiff(8, bytes(72)), (9, 8), []),
    "tiff of a strip beyond its end": (lambda: tiff(data=bytes(72), count=2**31, rows=2**31), (9, 8), []),
    "tiff without its pixels": (lambda: tiff(width=7900, height=8000, count=PIXELS), (7900, 8000), [TRUNCATED]),
    "tiff of 200 MB for 72 bytes": (lambda: tiff(data=ZEROS, packing=8, count=len(ZEROS)), (9, 8), []),
    "png of 200 MB for 216 bytes": (lambda: SMALL[:33] + chunk(b"IDAT", ZEROS) + chunk(b"IEND", b""), (9, 8), []),
    "png with a profile of 200 MB": (lambda: png_with(chunk(b"iCCP", b"x\0\0" + ZEROS)), (9, 8), [TRUNCATED]),
    "png with a text of 200 MB": (lambda: png_with(chunk(b"zTXt", b"x\0\0" + ZEROS)), (9, 8), [TRUNCATED]),
    "png with broken exif": (lambda: png_with(chunk(b"eXIf", b"II*\0\x08\0\0\0" + b"\xff" * 60_000)), (9, 8), []),
    "one pixel": (lambda: encoded(Image.new("RGB", (1, 1), "red")), (1, 1), []),
    "one pixel of jpeg": (lambda: encoded(Image.new("L", (1, 1)), "JPEG"), (1, 1), []),
    "a line": (lambda: encoded(Image.new("RGB", (60_000, 1), "red"), "JPEG"), (60_000, 1), []),
    "a column": (lambda: encoded(Image.new("RGB", (1, 60_000), "red")), (1, 60_000), []),
    "16 bits": (lambda: encoded(Image.fromarray(np.full((8, 9), 40_000, np.uint16))), (9, 8), []),
    "cmyk": (lambda: encoded(Image.new("CMYK", (9, 8)), "JPEG"), (9, 8), []),
    "palette with transparency": (see_through_palette, (9, 8), [TRANSPARENT]),
}
REFUSED = {  # kind: the file, words of the error
    "empty": (lambda: b"", "empty"),
    "svg": (lambda: b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "draw it as PNG"),
    "page": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "gif of a wide screen": (wide_gif, "at most 64000000 pixels"),
    "jp2 that says it is wide": (wide_jp2, "at most 64000000 pixels"),
    "wide avif": (lambda: encoded(Image.new("L", (9000, 8000)), "AVIF", speed=10), "at most 64000000 pixels"),
    "png with 200 texts of a megabyte": (
        lambda: png_with(*[chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**20 - 1), 9))] * 200),
        "Too much memory used in text chunks",
    ),
    "cut avif": (lambda: encoded(Image.fromarray(smooth(40, 50)), "AVIF")[:-60], "cannot read image"),
    "cut jp2": (lambda: encoded(Image.fromarray(smooth(40, 50)), "JPEG2000")[:90], "cannot read image"),
    "tiff of no size": (lambda: tiff(width=0, height=0, rows=1), "cannot read image"),
    "icon": (lambda: encoded(Image.new("RGB", (16, 16)), "ICO"), "of no known format"),
}


def file_of(made):
    """The file; None where Pillow here cannot write it."""
    try:
        return made()
    except (KeyError, OSError):
        return None


@pytest.mark.parametrize("kind", READ)
def test_odd_pictures_that_are_read(kind):
    make, size, notes = READ[kind]
    if "avif" in kind and not has("avif"):
        pytest.skip("Pillow without AVIF")
    data = make()
    found: list[str] = []
    pixels = decode_image(data, limits=LIMITS, notes=found)
    assert pixels.shape == (size[1], size[0], 3) and found == [note for note in notes if note == TRUNCATED]
    probed = decode_picture(data, limits=LIMITS, truncated="load", probe=True)
    assert (probed.width, probed.height) == size and probed.notes == notes
    if TRUNCATED in notes:
        with pytest.raises(DataError, match="cannot read image"):
            decode_image(data, limits=LIMITS, truncated="skip")


@pytest.mark.parametrize("kind", REFUSED)
def test_odd_pictures_that_are_refused(kind):
    make, words = REFUSED[kind]
    if "avif" in kind and not has("avif"):
        pytest.skip("Pillow without AVIF")
    data = make()
    for probe in (False, True):
        with pytest.raises(DataError, match=words) as caught:
            decode_picture(data, limits=LIMITS, truncated="load", probe=probe)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_the_first_frame_is_the_one_that_is_read():
    for kind in ("WEBP", "TIFF", *(["AVIF"] if has("avif") else [])):
        options = (
            {}
            if kind == "TIFF"
            else {"lossless": True}
            if kind == "WEBP"
            else {"quality": 100, "speed": 10, "subsampling": "4:4:4"}
        )
        away = np.abs(decode_image(frames(kind, 5, **options)).astype(int) - picture(32, 40)).mean()
        assert away < (30 if kind == "AVIF" else 0.1), kind  # another frame of noise is 85 away


def test_prepare_index_and_training_agree(tmp_path, capsys):
    """All of them named .jpg, in one data set."""
    kinds = {k: d for k in (*READ, *REFUSED) if (d := file_of({**READ, **REFUSED}[k][0])) is not None}
    large = [kind for kind in kinds if kind in READ and READ[kind][1][0] * READ[kind][1][1] > 10**7]
    lines = []
    for kind, data in kinds.items():
        if kind not in large:
            (tmp_path / f"{kind}.jpg").write_bytes(data)
            lines.append(json.dumps({"key": kind.replace(" ", "-"), "image": f"{kind}.jpg", "caption": "x"}) + "\n")
    (tmp_path / "odd.jsonl").write_text("".join(lines))
    assert main(["prepare", str(tmp_path / "odd.jsonl"), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    skipped = [json.loads(line) for line in (tmp_path / "out" / "odd" / "skipped.jsonl").read_text().splitlines()]
    assert {line["key"] for line in skipped} == {kind.replace(" ", "-") for kind in kinds if kind in REFUSED}
    for line in skipped:
        assert line["field"] == "image" and line["seen"] and "\n" not in line["detail"]
    assert main(["shards", "check", str(tmp_path / "out" / "odd"), "--workers", "0"]) == 0
    config = DataConfig(sources={"odd": SourceConfig(path=str(tmp_path / "out" / "odd"))})
    builder, im_patch = default_builder(config)
    reader = ExampleReader(config, builder, im_patch)
    examples = [reader[n] for n in range(len(reader.datasets["odd"]))]
    assert len(examples) == len(lines) - len(skipped)
    assert all(getattr(example, "crops", np.zeros(0)).size for example in examples), examples
    assert "2  an image cut off or damaged inside: loaded as far as it goes" in capsys.readouterr().out
