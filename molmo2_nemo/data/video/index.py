"""The frames of a stream and their times, from its packets alone: nothing is decoded.

The duration is that of the content, whatever the header says. A frame is known by its number in the order of showing;
how its number is found when it comes out of the decoder is the index's `order`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.video.container import Deadline
from molmo2_nemo.errors import DataError

EDGE = 1e-6  # seconds a requested time is kept away from both ends of the stream
BACKWARDS = 0.1  # seconds by which a clock that starts again goes back at least; by less it is uneven
JUMP = 10  # frames by which the clock of a program stream jumps at least
AROUND = 32  # frames before and after one of a program stream that say how late the clock is there
REORDERED = 0.02  # share of frames that are shown before the one stored before them, in a film that has such frames
# FFmpeg's field order. H.264 of any other may have the two fields of a frame in packets of their own, each with a time
# stamp, so that neither can be told from a frame: nothing of it is skipped or held back.
PROGRESSIVE = 1
NONE = -(1 << 62)  # stands for a time stamp that a packet lacks
LOWEST = -(1 << 60)  # a time stamp before all others that seeking accepts

# stamps: by its time stamp. joined: by its time stamp, once the clock of each joined part is moved behind the part
# before it. counted: by counting, since the stamps are missing or do not fit the pictures.
Order = Literal["stamps", "joined", "counted"]


def seconds_of(ticks: Any, base: Fraction) -> Any:
    """Seconds of a count of ticks (a number or an int64 array): multiplied first, then divided, as float64.

    One rounding, so that a frame at 0.5 s is at 0.5 whatever the time base; `ticks * float(base)` rounds twice, and
    with a time base such as 1/600 many frames then begin just after the time they are asked for.
    """
    return np.asarray(ticks, np.float64) * base.numerator / base.denominator


@dataclass(frozen=True)
class VideoIndex:
    """The times of a stream's frames in the order in which they are shown."""

    pts: np.ndarray  # int64 [frames], ascending, in ticks of the time base
    keys: np.ndarray  # int64 [key frames], their pts
    key_dts: np.ndarray  # int64 [key frames]
    base: Fraction  # seconds of a tick
    end: int  # end of the last frame, ticks
    order: Order = "stamps"
    joints: tuple[tuple[int, int], ...] = ()  # joined: (first packet, ticks to add) of each part, in decoding order
    first_is_right: bool = False  # counted: the stamp of the first frame that leaves the decoder tells its number
    in_decoding_order: bool = (
        False  # the stamps ascend from packet to packet: either no frame is reordered, or they lie
    )

    @property
    def duration(self) -> float:
        return float(seconds_of(self.end - int(self.pts[0]), self.base))

    @property
    def fps(self) -> float:
        return len(self.pts) / self.duration if self.duration > 0 else 1.0

    @property
    def gop(self) -> int:
        """Most frames from a key frame to the next, or to the end; all of them where none can be sought."""
        keys = np.searchsorted(self.pts, self.keys if self.order == "stamps" else self.keys[:1])
        return int(np.diff(np.append(keys, len(self.pts))).max())

    def frame_at(self, seconds: np.ndarray) -> np.ndarray:
        """Numbers of the frames shown at times from the start of the first frame: int64 [n]."""
        inside = np.maximum(np.minimum(seconds, self.duration - EDGE), EDGE)
        begins = seconds_of(self.pts - self.pts[0], self.base)
        return np.clip(np.searchsorted(begins, inside, side="right") - 1, 0, len(self.pts) - 1)

    def seconds_after(self, stamp: int) -> np.ndarray:
        """Seconds from the start of the first frame to a time stamp."""
        return np.asarray(seconds_of(stamp - int(self.pts[0]), self.base))

    def counted(self) -> VideoIndex:
        """The same times, for frames that are found by counting."""
        return replace(self, order="counted")


@dataclass(frozen=True)
class Packets:
    """The packets of a stream that hold a frame, in decoding order."""

    pts: np.ndarray  # int64 [n]; the dts where there is none; NONE where there is neither
    dts: np.ndarray  # int64 [n], or NONE
    durations: np.ndarray  # int64 [n], 0: not given
    keys: np.ndarray  # bool [n]

    def __getitem__(self, part: Any) -> Packets:
        return Packets(self.pts[part], self.dts[part], self.durations[part], self.keys[part])


def holds_frame(packet: Any) -> bool:
    """Whether a packet counts: it has content, and its frame is meant to be shown."""
    return bool(packet.size) and not packet.is_discard


def in_frames(context: Any) -> bool:
    """Whether each packet is a frame, not perhaps one of its two fields."""
    # PyAV before 16 does not say: then nothing of H.264 is skipped, which is slower and never wrong
    return bool(context.codec.name != "h264" or getattr(context, "field_order", None) == PROGRESSIVE)


def stamp_of(packet: Any) -> int | None:
    """The time stamp of a packet, its dts in place of a missing pts."""
    return packet.pts if packet.pts is not None else packet.dts


def read_packets(container: Any, stream: Any, limits: LimitsConfig, deadline: Deadline) -> Packets:
    """Raises DataError for no frames, and for more frames or processor time than the limits allow."""
    rows: list[tuple[int, int, int, bool]] = []
    for packet in container.demux(stream):
        if not holds_frame(packet):
            continue
        pts, dts = stamp_of(packet), packet.dts
        stamps = (NONE if pts is None else pts, NONE if dts is None else dts)
        rows.append((*stamps, packet.duration or 0, packet.is_keyframe))
        if len(rows) > limits.video_frames:
            raise DataError(f"video has more than {limits.video_frames} frames (data.limits.video_frames)")
        if len(rows) % 1024 == 0:
            deadline.check()
    if not rows:
        raise DataError("video has no frames")
    table = np.array(rows, dtype=np.int64)
    return Packets(table[:, 0], table[:, 1], table[:, 2], table[:, 3] != 0)


def scan(container: Any, stream: Any, limits: LimitsConfig, deadline: Deadline) -> VideoIndex:
    """Read the packets of a stream without decoding.

    Raises:
        DataError: no frames, or more frames, seconds or processor time than the limits allow.
    """
    packets = read_packets(container, stream, limits, deadline)
    base, rate = Fraction(stream.time_base), stream.guessed_rate or stream.average_rate
    if container.format.name == "mpeg" and in_frames(stream.codec_context) and not (packets.pts == NONE).all():
        index = program_stream_index(packets, base, rate)
    else:
        index = index_of(packets, base, rate)
    if index.duration > limits.video_seconds:
        raise DataError(
            f"video lasts {index.duration:.0f} s; at most {limits.video_seconds:.0f} s are read "
            "(data.limits.video_seconds)"
        )
    return index


def index_of(packets: Packets, base: Fraction, rate: Fraction | None) -> VideoIndex:
    """The index of a stream with these packets; `rate` (frames per second) gives the times where no packet has one.

    Raises:
        DataError: neither time stamps nor a rate.
    """
    if (packets.pts == NONE).all():
        return _without_stamps(len(packets.pts), base, rate)
    packets = packets[packets.pts != NONE]
    ascending = bool((np.diff(packets.pts) >= 0).all())
    starts = _restarts(packets, base)
    if len(starts) > 1:
        return _joined(packets, starts, base)
    shown = np.argsort(packets.pts, kind="stable")
    keys = shown[packets.keys[shown]]
    keys = keys if len(keys) else shown[:1]
    dts = np.where(packets.dts == NONE, packets.pts, packets.dts)
    return VideoIndex(
        np.unique(packets.pts),
        packets.pts[keys],
        np.maximum(dts[keys], LOWEST),
        base,
        _end(packets),
        in_decoding_order=ascending and not packets.keys.all(),
    )


def _without_stamps(count: int, base: Fraction, rate: Fraction | None) -> VideoIndex:
    if not rate:
        raise DataError("video has no time stamps and no frame rate")
    marks = np.array([round(i / (rate * base)) for i in range(count + 1)], np.int64)
    return VideoIndex(marks[:-1], marks[:1], marks[:1], base, int(marks[-1]), "counted")


def program_stream_index(packets: Packets, base: Fraction, rate: Fraction | None) -> VideoIndex:
    """The index of a film in an MPEG program stream, whose frames are counted and whose clock is evened out.

    Few frames have a time stamp of their own there. FFmpeg computes the others, gives runs of frames the stamps of
    others, and does so differently after seeking.
    """
    marks = _even_clock(packets, base, rate)
    first = packets.pts[packets.pts != NONE][: packets.pts.size // 2 or 1]
    marks += int(first.min()) - marks[0]
    return VideoIndex(marks[:-1], marks[:1], marks[:1], base, int(marks[-1]), "counted", first_is_right=True)


def _even_clock(packets: Packets, base: Fraction, rate: Fraction | None) -> np.ndarray:
    """When each frame is shown, and the end: int64 [n + 1], ascending, from 0 on.

    Frames follow each other by their durations, corrected by their stamps, which are evened out. A clock that jumps
    ahead by more than `JUMP` frames is believed; one that jumps back continues.
    """
    given = packets.durations[packets.durations > 0]
    usual = int(np.median(given)) if len(given) else round(1 / (rate * base)) if rate else 1
    marks = np.concatenate([[0], np.cumsum(np.where(packets.durations > 0, packets.durations, usual))])
    known = np.flatnonzero(packets.dts != NONE)
    late = packets.dts[known] - marks[known]  # against the sum of the durations
    reordered = bool(np.count_nonzero(np.diff(packets.pts[known]) < 0) > REORDERED * len(known))
    steps = np.diff(late)
    jumps = np.abs(steps) > JUMP * usual
    late = late - late[0] - np.concatenate([[0], np.cumsum(np.where(jumps & (steps < 0), steps, 0))])
    for part in np.split(np.arange(len(known)), np.flatnonzero(jumps) + 1):
        late[part] = _running_median(_of_own_stamps(late[part], usual, reordered))
    late = np.concatenate([[0], late])[np.searchsorted(known, np.arange(len(marks)), side="right")]
    counts = np.arange(len(marks))
    marks = np.maximum.accumulate(marks + late - counts) + counts
    return marks - marks[0]


def _of_own_stamps(late: np.ndarray, usual: int, reordered: bool) -> np.ndarray:
    """How late the clock is, int64 [n], without the runs of frames to which FFmpeg gives the stamps of others.

    Frames stored in the order of showing get those of the next ones: a gap at the run's start, two frames at once at
    its end. Reordered ones get earlier stamps: frames at once at its start, a gap at its end. As no two frames are
    shown at once, a step back is always one end of a run, whose other end may be that of the film. A step ahead without
    a step back is a missing frame, but for the only step of a film, shortly before its end.

    Args:
        usual: ticks of a frame.
        reordered: whether there are frames that are shown in another order than they are stored in.
    """
    steps = np.diff(late)
    change = np.zeros_like(late)
    begun: list[int] = []

    def undo(first: int, after: int | None) -> None:
        change[first + 1] -= steps[first]
        if after is not None:
            change[after + 1] += steps[first]

    for at in np.flatnonzero((np.abs(steps) > usual * 3 // 4) & (np.abs(steps) <= JUMP * usual)).tolist():
        if (steps[at] < 0) == reordered:
            begun.append(at)
            continue
        fitting = [first for first in begun if abs(steps[first] + steps[at]) < usual // 2]
        if fitting:
            undo(fitting[-1], at)
            begun.remove(fitting[-1])
        elif not reordered:
            undo(at, None)
    if reordered or (len(begun) == 1 and len(late) - begun[0] <= 2 * AROUND and steps[begun[0]] < 2 * usual):
        for at in begun:
            undo(at, None)
    return late + np.cumsum(change)


def _running_median(values: np.ndarray) -> np.ndarray:
    """The median of the values around each, int64 [n]."""
    padded = np.pad(values, AROUND, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * AROUND + 1)
    parts = [np.median(windows[at : at + 4096], axis=1) for at in range(0, len(windows), 4096)]  # in little memory
    return np.concatenate(parts).astype(np.int64)


def _end(packets: Packets) -> int:
    """When the frame shown last ends. One that has no duration lasts as long as most others."""
    last = int(np.lexsort((packets.durations, packets.pts))[-1])
    gaps = np.diff(np.unique(packets.pts))
    usual = int(np.median(gaps)) if len(gaps) else 0
    return int(packets.pts[last]) + (int(packets.durations[last]) or usual)


def _restarts(packets: Packets, base: Fraction) -> list[int]:
    """The first packet of each part of a stream whose clock starts again, as in files joined end to end; [0] if never.

    In decoding order, no key frame is shown before a frame that precedes it, and decoding times never descend.
    """
    least = max(round(BACKWARDS / base), 1)
    highest = np.maximum.accumulate(np.concatenate([packets.pts[:1], packets.pts[:-1]]))
    known = (packets.dts[1:] != NONE) & (packets.dts[:-1] != NONE)
    back = np.concatenate([[False], known & (packets.dts[1:] < packets.dts[:-1] - least)])
    if not back.any() and not (packets.keys & (packets.pts < highest - least)).any():
        return [0]
    return list(_each_restart(packets, back, least))


def _each_restart(packets: Packets, back: np.ndarray, least: int) -> Iterator[int]:
    yield 0
    highest = int(packets.pts[0])
    for i, (pts, key) in enumerate(zip(packets.pts.tolist(), packets.keys.tolist(), strict=True)):
        if back[i] or (key and pts < highest - least):
            yield i
            highest = pts
        highest = max(highest, pts)


def _joined(packets: Packets, starts: list[int], base: Fraction) -> VideoIndex:
    """The parts one after the other, each beginning where the one before it ends."""
    joints, end = [], None
    moved = packets.pts.copy()
    for first, after in zip(starts, [*starts[1:], len(moved)], strict=True):
        part = packets[first:after]
        shift = 0 if end is None else end - int(part.pts.min())
        moved[first:after] += shift
        joints.append((first, shift))
        end = _end(part) + shift
    pts = np.unique(moved)
    return VideoIndex(pts, pts[:1], pts[:1], base, int(end or 0), "joined", tuple(joints))
