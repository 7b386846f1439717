"""Media files that a user names, in a prompt for example: read and checked before anything expensive begins."""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.errors import DataError, UserError


def read_media(path: Path, kind: str) -> bytes:
    """The bytes of a file that holds an image or a video.

    Args:
        kind: "image" or "video".

    Raises:
        UserError: no such file, or it cannot be decoded; names it.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    content = path.read_bytes()
    try:
        if kind == "image":
            from molmo2_nemo.data.pictures import decode_image

            decode_image(content)
        else:
            from molmo2_nemo.data.video.read import inspect_video

            inspect_video(content)
    except DataError as error:
        raise UserError(f"{path}: {error}") from None
    return content
