"""Decoding chosen frames of a film with TorchCodec, on the processor or with the decoder of an NVIDIA GPU.

TorchCodec counts the frames of a file by itself. It is used where its count and its times are those of our index,
which is checked for every frame, and in containers whose own index says where key frames lie. Elsewhere (MPEG streams,
AVI, FLV, joined or scrambled clocks, mirrored films, edit lists that hide frames) PyAV reads the film, and a warning
says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.video.container import Deadline, Source, check_size
from molmo2_nemo.data.video.film import Film
from molmo2_nemo.data.video.frames_pyav import PyAVFrames
from molmo2_nemo.data.video.index import seconds_of
from molmo2_nemo.data.video.orientation import is_mirrored
from molmo2_nemo.errors import DataError

KINDS = ("mov", "matroska")  # containers in which TorchCodec finds every frame again after seeking
INSTALL = "pip install 'molmo2_nemo[video]' (torchcodec of torch's own release, see docs/video_data.md)"


class _Unfit(DataError):
    """Why TorchCodec cannot be held to the index of a film."""


class TorchCodecFrames:
    """`Frames` by TorchCodec; by PyAV where that cannot give the frames of the index."""

    def __init__(self, source: Source, film: Film, limits: LimitsConfig, device: str):
        self._source, self._film, self._limits, self._device = source, film, limits, device
        self._other = PyAVFrames(source, film.index, limits)
        self.used = "torchcodec" if device == "cpu" else "nvdec"
        self._done = 0

    @property
    def decoded(self) -> int:
        return self._done + self._other.decoded

    @property
    def replaced(self) -> int:
        return self._other.replaced

    def frames(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        try:
            for pixels in self._exact(numbers):
                self._done += 1
                yield pixels
        except _Unfit as reason:
            warnings.warn(f"{self.used} is not used for some videos, PyAV reads them: {reason}")
            self.used = self._other.used
            yield from self._other.frames(numbers[self._done :])

    def _exact(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Frames whose times are checked against the index."""
        index, deadline = self._film.index, Deadline(self._limits.decode_seconds)
        decoder = self._opened()
        for number, seconds in zip(numbers.tolist(), seconds_of(index.pts[numbers], index.base).tolist(), strict=True):
            deadline.check()
            try:
                frame = decoder.get_frame_at(number)
            except RuntimeError as error:
                raise _Unfit(_cause(error)) from error
            if frame.pts_seconds != seconds:
                raise _Unfit("it takes other frames")
            height, width = frame.data.shape[:2]
            check_size(width, height, self._limits)
            yield frame.data.cpu().numpy()

    def _opened(self) -> Any:
        """A `VideoDecoder` that has the frames of the index."""
        film = self._film
        if film.index.order != "stamps":
            raise _Unfit(f"frames whose time stamps are {film.index.order}")
        if film.kind not in KINDS:
            raise _Unfit(f"containers of the kind {film.kind}")
        if is_mirrored(film.orientation):
            raise _Unfit("mirrored films")
        from torchcodec.decoders import VideoDecoder

        source = self._source if isinstance(self._source, bytes) else str(self._source)
        options: dict[str, Any] = {"stream_index": film.stream, "dimension_order": "NHWC", "num_ffmpeg_threads": 1}
        try:
            decoder = VideoDecoder(source, device=self._device, **options)
        except RuntimeError as error:
            raise _Unfit(_cause(error)) from error
        if len(decoder) != len(film.index.pts):
            raise _Unfit("it counts another number of frames")
        return decoder


def problem(device: str) -> str | None:
    """What keeps TorchCodec from working here, and what to do; None if nothing does."""
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except ImportError:
        return f"TorchCodec is not installed: {INSTALL}"
    except (RuntimeError, OSError) as error:  # it looks for FFmpeg's libraries when it is imported
        return (
            f"TorchCodec does not load ({_cause(error)}): install FFmpeg 4 to 8 with its shared libraries "
            f"(Debian and Ubuntu: apt-get install ffmpeg) and the torchcodec of torch's release: {INSTALL}"
        )
    if device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU, and torch finds none: use data.video.decoder=torchcodec"
    if torch.cuda._is_in_bad_fork():
        return "a forked decoding worker cannot use the GPU: set data.num_workers=0"
    return None


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
