"""H.264 films in which every frame is a pair of fields in packets of their own, written bit by bit: no encoder at hand
makes them, but broadcasts hold them.

All macroblocks are stored as they are (I_PCM), so that what a decoder has to show is known exactly. After ITU-T H.264,
7.3 (syntax): main profile, picture order count of type 0, CAVLC.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np

TICKS = 3600  # of a frame, in 1/90000 s
DELIMITER = b"\0\0\0\1\x09\xf0"


class Bits:
    def __init__(self) -> None:
        self.bits: list[int] = []

    def u(self, count: int, value: int) -> Bits:
        self.bits += [(value >> i) & 1 for i in range(count - 1, -1, -1)]
        return self

    def ue(self, *values: int) -> Bits:
        """Exponential Golomb codes."""
        for value in values:
            length = (value + 1).bit_length()
            self.u(length - 1, 0).u(length, value + 1)
        return self

    def align(self) -> Bits:
        return self.u(-len(self.bits) % 8, 0)

    def nal(self, head: int) -> bytes:
        """The unit with its start code, end bit and escapes."""
        data = np.packbits(np.array(self.u(1, 1).align().bits, np.uint8)).tobytes()
        out, zeros = bytearray(), 0
        for byte in data:
            if zeros >= 2 and byte <= 3:
                out.append(3)
                zeros = 0
            out.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes([head]) + bytes(out)


def parameters(width: int, height: int) -> bytes:
    sequence = Bits().u(8, 77).u(8, 0).u(8, 30).ue(0, 0, 0, 4, 2).u(1, 0).ue(width // 16 - 1, height // 32 - 1)
    picture = Bits().ue(0, 0).u(2, 0).ue(0, 0, 0).u(3, 0).ue(0, 0, 0).u(3, 0)
    return sequence.u(5, 0b00100).nal(0x67) + picture.nal(0x68)  # fields allowed


def field(luma: np.ndarray, bottom: int, key: bool, number: int, order: int, needed: bool) -> bytes:
    """A field picture, uint8 [H, W], grey."""
    bits = Bits().ue(0, 7, 0).u(4, number % 16).u(1, 1).u(1, bottom)
    bits = (bits.ue(0) if key else bits).u(8, order)
    bits = bits.u(2 if key else 1, 0) if needed else bits
    bits.ue(0)
    for y in range(0, luma.shape[0], 16):
        for x in range(0, luma.shape[1], 16):
            bits.ue(25).align()
            bits.bits += np.unpackbits(luma[y : y + 16, x : x + 16].copy()).tolist()
            bits.bits += np.unpackbits(np.full(128, 128, np.uint8)).tolist()
    return bits.nal((0x60 if needed else 0) | (5 if key else 1))


def film_of_fields(container: str, count: int = 24, gop: int = 8) -> tuple[bytes, np.ndarray]:
    """A film, and its pictures, uint8 [count, 64, 32] between 1 and 254. No picture needs another, but only every
    second may be needed by others, as the stream says."""
    pictures = np.random.default_rng(0).integers(1, 255, (count, 64, 32), dtype=np.uint8)
    stream, number = b"", 0
    for i, picture in enumerate(pictures):
        place = i % gop
        number = number if place else 0
        for bottom in (0, 1):
            key = place == 0 and not bottom
            stream += DELIMITER + (parameters(32, 64) if key else b"")
            stream += field(picture[bottom::2], bottom, key, number, 2 * place + bottom, place % 2 == 0)
        number += place % 2 == 0
    file = io.BytesIO()
    base = Fraction(1, 90000)
    with av.open(io.BytesIO(stream), format="h264") as source, av.open(file, "w", format=container) as out:
        track: Any = out.add_stream_from_template(source.streams.video[0])
        track.time_base = base
        for half, packet in enumerate(p for p in source.demux(video=0) if p.size):
            packet.time_base, packet.duration = base, TICKS // 2
            packet.pts = packet.dts = half * TICKS // 2
            packet.stream = track
            out.mux(packet)
    return file.getvalue(), pictures
