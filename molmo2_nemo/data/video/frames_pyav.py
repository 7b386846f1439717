"""Decoding chosen frames of a film with PyAV.

A frame is reached the shortest way: by decoding on from the current position, or by seeking to the key frame before it.
At most two decoded frames are in memory. Films whose time stamps do not say where to seek to are decoded from their
start. A packet that the decoder refuses is a lost frame.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from typing import Any

import numpy as np
from av.error import FFmpegError
from av.error import MemoryError as OutOfMemory

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.video.container import Deadline, Source, check_size, open_video
from molmo2_nemo.data.video.index import VideoIndex, holds_frame, in_frames, stamp_of
from molmo2_nemo.data.video.orientation import frame_orientation, upright
from molmo2_nemo.errors import DataError

SEEK_GAP = 8  # frames; decoding on over fewer frames than this is cheaper than seeking
# Their frames that no other needs are skipped unless wanted. Others skip later than they are told (AV1) or are rare.
SKIPPING = ("h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video", "vp8", "vp9")
PROBED = 64  # frames decoded to see whether time stamps fit the pictures


class ScrambledStamps(DataError):
    """Frames do not leave the decoder in the order of their time stamps; they have to be counted."""


class PyAVFrames:
    """`Frames` by PyAV, for an index of any order."""

    used = "pyav"

    def __init__(self, source: Source, index: VideoIndex, limits: LimitsConfig):
        self._source, self._index, self._limits = source, index, limits
        self.decoded = self.replaced = 0

    def frames(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        from av.video.reformatter import VideoReformatter

        deadline = Deadline(self._limits.decode_seconds)
        colours = VideoReformatter()  # made once: it computes tables for the kind of frame that it is given
        with open_video(self._source, self._limits) as (container, stream):
            reader = reader_of(container, stream, self._index, numbers, deadline)
            for number in numbers.tolist():  # no name keeps a frame or its pixels: the next ones take their memory
                yield self._pixels(reader.at(number), colours)
                self.decoded, self.replaced = reader.decoded, reader.replaced

    def _pixels(self, frame: Any, colours: Any) -> np.ndarray:
        """A decoded frame as it is shown: uint8 [H, W, 3]."""
        check_size(frame.width, frame.height, self._limits)  # a stream may change its frame size midway
        return upright(colours.reformat(frame, format="rgb24").to_ndarray(), frame_orientation(frame))


def reader_of(container: Any, stream: Any, index: VideoIndex, wanted: np.ndarray, deadline: Deadline) -> _Reader:
    """The way to read a container that was just opened; `wanted`: the numbers of all frames that will be asked for."""
    if index.order == "counted":
        return _CountingReader(index, _decode(container, stream, None, deadline))
    if index.order == "joined":
        stamps = frozenset(index.pts[wanted].tolist())
        return _StampReader(index, _decode(container, stream, stamps, deadline, index.joints))
    return _SeekingReader(container, stream, index, wanted, deadline)


def stamps_fit(container: Any, stream: Any, deadline: Deadline) -> bool:
    """Whether the first frames leave the decoder in the order of their time stamps. Reads from the present position."""
    last = None
    for count, frame in enumerate(_decode(container, stream, None, deadline), start=1):
        if frame.pts is not None and last is not None and frame.pts < last:
            return False
        last = frame.pts if frame.pts is not None else last
        if count == PROBED:
            break
    return True


class _Reader(ABC):
    """Reads decoded frames forward. Holds at most two, and one while the next is decoded, which is then faster."""

    def __init__(self, frames: Iterator[Any]) -> None:
        self._frames = frames
        self._last: Any = None
        self._before: Any = None
        self.decoded = self.replaced = 0

    @abstractmethod
    def at(self, number: int) -> Any:
        """The decoded frame with this number; numbers must not decrease from call to call."""

    def _step(self) -> bool:
        """Take the next frame; False at the end."""
        self._before = None
        for frame in self._frames:
            if self._take(frame):
                self._before, self._last = self._last, frame
                self.decoded += 1
                return True
        return False

    def _take(self, frame: Any) -> bool:
        """Whether a frame counts."""
        return True

    def _found(self) -> Any:
        if self._last is None:
            raise DataError("no frame of the video could be decoded")
        return self._last


class _CountingReader(_Reader):
    """Numbers are those in which frames leave the decoder; the last one stands for those that are missing."""

    def __init__(self, index: VideoIndex, frames: Iterator[Any]) -> None:
        super().__init__(frames)
        self._index = index
        self._lost = 0  # frames before the first that can be decoded

    def at(self, number: int) -> Any:
        while self._lost + self.decoded <= number and self._step():
            pass
        self.replaced += not self._lost <= number < self._lost + self.decoded
        return self._found()

    def _take(self, frame: Any) -> bool:
        if not self.decoded and self._index.first_is_right and frame.pts is not None:
            self._lost = int(self._index.frame_at(self._index.seconds_after(frame.pts)))
        return True


class _StampReader(_Reader):
    """Numbers are found by time stamps. A frame that the decoder dropped is replaced by the one shown before it."""

    def __init__(self, index: VideoIndex, frames: Iterator[Any]) -> None:
        super().__init__(frames)
        self._index = index

    def at(self, number: int) -> Any:
        target = int(self._index.pts[number])
        while self._last is None or self._last.pts < target:
            if not self._step():
                break
        last = self._found()
        self.replaced += last.pts != target
        return self._before if last.pts > target and self._before is not None else last

    def _take(self, frame: Any) -> bool:
        if frame.pts is None:
            frame.pts = frame.dts
        if self._index.in_decoding_order and None not in (self._last, frame.pts) and frame.pts < self._last.pts:
            raise ScrambledStamps("the frames of the video are not in the order of their time stamps")
        return frame.pts is not None


class _SeekingReader(_StampReader):
    """Seeks where that saves decoding.

    Frames that are neither wanted nor needed for decoding others (about half of those in H.264 with B frames) are
    skipped, and before it seeks on the decoder is asked for the frames that it holds back instead of being fed with
    more. The frames are the same as if all had been decoded.

    Args:
        wanted: ascending numbers of all frames that will be asked for.
    """

    def __init__(self, container: Any, stream: Any, index: VideoIndex, wanted: np.ndarray, deadline: Deadline):
        super().__init__(index, iter(()))
        self._container, self._stream, self._deadline = container, stream, deadline
        self._wanted = index.pts[wanted]
        self._stamps = frozenset(self._wanted.tolist())
        self._runs: np.ndarray | None = _runs(index, wanted)  # None: the decoder is fed with all packets
        self._seeks = True  # False: decodes on to the end
        self._sought = 0  # time stamp
        self._due: set[int] | None = None  # stamps until which the decoder is fed; None: as long as frames are needed

    def at(self, number: int) -> Any:
        self._jump_if_worth_it(int(self._index.pts[number]))
        return super().at(number)

    def _jump_if_worth_it(self, target: int) -> None:
        index = self._index
        if not self._seeks:
            return
        key = max(int(np.searchsorted(index.keys, target, side="right")) - 1, 0)
        if self._last is not None:
            here = int(np.searchsorted(index.pts, self._last.pts))
            if index.keys[key] <= self._last.pts or int(np.searchsorted(index.pts, index.keys[key])) - here < SEEK_GAP:
                return
        if self._runs is not None:
            first = int(np.searchsorted(self._wanted, target))
            run = self._wanted[first : int(self._runs[np.searchsorted(self._runs, first, side="right")])]
        # Containers differ in which of a key frame's times they search by; some then land on the key frame after it.
        for timestamp in (index.keys[key], index.key_dts[key]):
            self._due = None if self._runs is None else set(run.tolist())
            self._seek(int(timestamp))
            if self._step() and self._last.pts <= target:
                return
        # Nothing is shown from this key frame on, as with periodic intra refresh: read all, and seek no more.
        self._seeks, self._runs, self._due = False, None, None
        self._seek(int(min(index.key_dts[0], index.pts[0])))
        self._step()

    def _seek(self, timestamp: int) -> None:
        try:
            self._container.seek(timestamp, stream=self._stream, backward=True)
        except FFmpegError:  # some containers cannot find their very first frame by its time
            self._container.seek(int(self._index.pts[0]), stream=self._stream, backward=True, any_frame=True)
        self._sought, self._last, self._before = timestamp, None, None
        self._frames = _decode(self._container, self._stream, self._stamps, self._deadline, due=self._due)

    def _step(self) -> bool:
        return super()._step() or (self._due is not None and not self._due and self._step_whole())

    def _step_whole(self) -> bool:
        """The next frame where one that was asked for did not come out: decode the same part again, and from there on
        feed the decoder with all packets, so that what stands in for a broken frame is the frame shown before it."""
        last = self._last.pts if self._last is not None else None
        self._runs = self._due = None
        self._seek(self._sought)
        while super()._step():
            if last is None or self._last.pts > last:
                return True
        return False


def _runs(index: VideoIndex, wanted: np.ndarray) -> np.ndarray:
    """Where runs of wanted frames end between which the reader seeks: ascending positions in `wanted`, int64 [runs]."""
    keys = np.searchsorted(index.pts, index.keys)
    key = keys[np.maximum(np.searchsorted(keys, wanted, side="right") - 1, 0)]  # [n], number of the key frame before
    seeks = key[1:] - wanted[:-1] >= SEEK_GAP
    return np.append(np.flatnonzero(seeks) + 1, len(wanted))


def _decode(
    container: Any,
    stream: Any,
    wanted: Container[int] | None,
    deadline: Deadline,
    joints: tuple[tuple[int, int], ...] = (),
    due: set[int] | None = None,
) -> Iterator[Any]:
    """Frames from the current position on.

    Args:
        wanted: time stamps; other frames may be left out where none is predicted from them. None: all frames.
        joints: `VideoIndex.joints`, where the container is read from its start; moves the time stamps.
        due: of `wanted`; once the packets with these stamps have been read, and taken out of the set, the frames end
            with those that can be decoded without the packets that follow.
    """
    context = stream.codec_context
    fields = not in_frames(context)
    skip = wanted is not None and context.codec.name in SKIPPING and not fields
    shifts = list(reversed(joints))
    shift = count = 0
    for packet in _demuxed(container, stream):
        deadline.check()
        stamp = stamp_of(packet)
        if joints and stamp is not None and holds_frame(packet):
            if shifts and count >= shifts[-1][0]:
                shift = shifts.pop()[1]
            count += 1
            stamp += shift
            packet.pts, packet.dts = stamp, None if packet.dts is None else packet.dts + shift
        if skip and wanted is not None:
            context.skip_frame = "NONREF" if stamp is not None and stamp not in wanted else "DEFAULT"
        yield from _frames_of(context, packet)
        if due is not None:
            due.discard(stamp)  # type: ignore[arg-type]
            if not due and not fields:
                yield from _frames_of(context, None)
                return


def _demuxed(container: Any, stream: Any) -> Iterator[Any]:
    """The packets from the current position on; where they cannot be read on, the film ends."""
    from av import Packet

    try:
        yield from container.demux(stream)
    except FFmpegError:
        last = Packet()  # empty: asks the decoder for the frames that it holds back
        last.stream = stream
        yield last


def _frames_of(context: Any, packet: Any) -> list[Any]:
    """The frames that come out of the decoder for a packet; none where it is damaged."""
    try:
        return context.decode(packet)
    except OutOfMemory:
        raise
    except FFmpegError:
        return []
