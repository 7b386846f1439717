"""What a file is that turned out to be no picture or no video, told by its first bytes, and what to do about it."""

from __future__ import annotations


def known_as(data: bytes) -> str:
    """What a file is that is no picture this package reads, with what to do; "" if nothing is known of it."""
    if not data:
        return "empty (0 bytes); fetch it again"
    head = data[:1024].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<!--", b"<body")) or b"<html" in head:
        return "an HTML page, such as a server sends in place of a file that is gone"
    if head.startswith((b"<svg", b"<?xml")):
        return "SVG or XML; draw it as PNG"
    if head.startswith((b"{", b"[")):
        return "text (JSON?), such as a server's message"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs, not the file; run git lfs pull"
    return _by_first_bytes(data, MAGIC)


def known_instead_of_video(head: bytes) -> str:
    """The same for a file that is no video, of which `head` are the first bytes; "" if nothing is known of it."""
    picture = _by_first_bytes(head, PICTURES)
    if picture:
        return f"a picture ({picture}): name it as image"
    known = known_as(head)
    return "" if known.startswith("a video") else known


def _by_first_bytes(data: bytes, table: tuple[tuple[int, bytes, str], ...]) -> str:
    """The words of the first row of a table (place, bytes that stand there, words) that fits; "" if none does."""
    return next((words for place, magic, words in table if data[place : place + len(magic)] == magic), "")


PICTURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (8, b"WEBP", "WebP"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavif", "AVIF"),
)
_CONVERT = "convert it to JPEG or PNG"
MAGIC = (
    (4, b"ftypavi", "AVIF, which this Pillow was built without: install Pillow 11.3 or later, or " + _CONVERT),
    (4, b"jP  ", "JPEG 2000, which this Pillow was built without; " + _CONVERT),
    (4, b"ftyphei", "HEIC; " + _CONVERT),
    (4, b"ftyphev", "HEIC; " + _CONVERT),
    (4, b"ftypmif1", "HEIF; " + _CONVERT),
    (4, b"ftyp", "a video (MP4 or its like): name it as video"),
    (0, b"\x1aE\xdf\xa3", "a video (WebM or Matroska): name it as video"),
    (8, b"AVI ", "a video (AVI): name it as video"),
    (0, b"%PDF", "a PDF; draw its pages as PNG"),
    (0, b"\x1f\x8b", "compressed with gzip; unpack it"),
    (0, b"PK\x03\x04", "a zip archive; unpack it"),
    (0, b"8BPS", "a Photoshop file; " + _CONVERT),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL; " + _CONVERT),
    (0, b"\xff\x0a", "JPEG XL; " + _CONVERT),
    (0, b"%!PS", "PostScript; draw it as PNG"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR; " + _CONVERT),
    (0, b"II+\0", "a BigTIFF; " + _CONVERT),
    (0, b"MM\0+", "a BigTIFF; " + _CONVERT),
)
