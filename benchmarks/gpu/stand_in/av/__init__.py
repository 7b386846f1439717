"""Stands where PyAV, the video decoder, was left out of a kit: it can be imported, and says so when it is used."""

from __future__ import annotations

from typing import Any, NoReturn

from av import error

__all__ = ["error", "open"]


def open(*args: Any, **settings: Any) -> NoReturn:
    """In place of av.open.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "this kit has no video decoder (PyAV was left out for its size): train on shards of images, or build the kit "
        "with make gpu-kit KIT_ARGS=--with-video"
    )
