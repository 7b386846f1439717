"""The decoders that a run can choose (`data.video.decoder`), behind one interface: chosen frames of one film, as RGB.

pyav        PyAV, with the FFmpeg libraries of its wheel. Reads every film.
torchcodec  TorchCodec, with the machine's FFmpeg libraries, on the processor.
nvdec       TorchCodec with the decoder of an NVIDIA GPU.

All take the frames that one index numbers. Where TorchCodec cannot be held to that index, PyAV reads the film.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.video.container import Source
from molmo2_nemo.data.video.film import Film
from molmo2_nemo.data.video.frames_pyav import PyAVFrames
from molmo2_nemo.errors import UserError


class Frames(Protocol):
    """Decodes chosen frames of one film."""

    used: str  # the decoder that gave the last frame

    @property
    def decoded(self) -> int:
        """Frames decoded for those asked for; the same number where the decoder does not tell."""

    @property
    def replaced(self) -> int:
        """Frames that could not be decoded, so that the one shown before stands in."""

    def frames(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Upright RGB images, uint8 [H, W, 3], of frames with strictly ascending numbers, int64 [n].

        Raises:
            ScrambledStamps: those handed out so far may be wrong; begin again with `VideoIndex.counted()`.
            DataError: broken, or beyond the limits.
        """


def frames_of(name: str, source: Source, film: Film, limits: LimitsConfig) -> Frames:
    """The chosen decoder for one film.

    Raises:
        UserError: unknown, or what it needs is not installed.
    """
    if name == "pyav":
        return PyAVFrames(source, film.index, limits)
    check_decoder(name)
    from molmo2_nemo.data.video.frames_torchcodec import TorchCodecFrames

    return TorchCodecFrames(source, film, limits, "cuda" if name == "nvdec" else "cpu")


def check_decoder(name: str) -> None:
    """Raises UserError for a decoder that is unknown or cannot work here, and says what to install or change."""
    if name == "pyav":
        return
    if name not in ("torchcodec", "nvdec"):
        raise UserError(f"data.video.decoder={name}: known are pyav, torchcodec and nvdec")
    from molmo2_nemo.data.video.frames_torchcodec import problem

    found = problem("cuda" if name == "nvdec" else "cpu")
    if found:
        raise UserError(f"data.video.decoder={name}: {found}, or use data.video.decoder=pyav")
