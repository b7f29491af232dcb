"""Whether a PNG file holds all its rows: Pillow leaves those black that image data which ends early does not reach."""

from __future__ import annotations

import struct
import zlib

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the colour type
_WHOLE = ((0, 0, 1, 1),)
# Left, top, and the steps across and down, of each pass of an interlaced picture.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 2**20


def has_all_rows(data: bytes) -> bool:
    """Whether the image data of a PNG file, which a decoder has read to its end, is as long as its header says."""
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    expected = 0
    for left, top, across, down in _PASSES if interlaced else _WHOLE:
        columns, rows = -((left - width) // across), -((top - height) // down)
        expected += rows * (1 + -(-columns * depth * _CHANNELS[color] // 8)) if columns > 0 else 0
    return _inflated(data, expected) >= expected


def _inflated(data: bytes, enough: int) -> int:
    """Return how many bytes the image data unpacks to, counted until there are enough."""
    stream, total, start = zlib.decompressobj(), 0, 8
    while start + 8 <= len(data) and total < enough:
        length, kind = struct.unpack_from(">I4s", data, start)
        packed = data[start + 8 : start + 8 + length] if kind == b"IDAT" else b""
        while packed and total < enough:
            total += len(stream.decompress(packed, _PIECE))
            packed = stream.unconsumed_tail
        start += length + 12
    return total
