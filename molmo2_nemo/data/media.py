"""Media files that a user names, in a prompt for example: read and checked before anything expensive begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from molmo2_nemo.errors import DataError, UserError


def read_media(path: Path, kind: str, cut: list[Path] | None = None, clip: tuple[float, float] | None = None) -> bytes:
    """The bytes of a file that holds an image or a video.

    Args:
        kind: "image" or "video".
        cut: gets the path of an image that is cut off or damaged inside.
        clip: the part of a video that is shown, in seconds.

    Raises:
        UserError: no such file, it cannot be decoded, or a clip that does not lie in it; names it.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    content = path.read_bytes()
    try:
        if kind == "image":
            from molmo2_nemo.data.pictures import decode_image

            notes: list[str] = []
            decode_image(content, notes=notes)
            if notes and cut is not None:
                cut.append(path)
        else:
            from molmo2_nemo.data.video.read import clip_within, inspect_video

            clip_within(clip, inspect_video(content).duration)
    except DataError as error:
        raise UserError(f"{path}: {error}") from None
    return content


def said_of_cut(cut: Sequence[Path], truncated: str) -> list[str]:
    """What to say of images that are cut off or damaged inside, a line each.

    Args:
        truncated: `data.image.truncated` of the run whose model sees them.
    Raises:
        UserError: the run does not read such images; names the first.
    """
    if cut and truncated == "skip":
        raise UserError(
            f"{cut[0]}: cut off or damaged inside; the run does not read such images (data.image.truncated=skip)"
        )
    return [f"{path}: cut off or damaged inside; loaded as far as it goes (data.image.truncated=load)" for path in cut]
