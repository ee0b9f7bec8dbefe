"""JPEG, JPEG-LS and JPEG 2000 code streams before they are decoded: what size they claim, and one known slip mended.

A decoder allocates what the stream claims, not what the DICOM header says, so a stream of another size than the
header's is refused here. Markers: ITU-T T.81 (JPEG), T.87 (JPEG-LS), T.800 Annex A (JPEG 2000).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from carina.imaging.header import Unreadable

MAX_TILES = 2**12  # of a JPEG 2000 image; decoders keep tables for each
_SOC_SIZ = b"\xff\x4f\xff\x51"
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 and that of JPEG-LS
_SEQUENTIAL = {0xC0, 0xC1}
_SCAN = 0xDA


def check_stream(stream: bytes, rows: int, columns: int, samples: int) -> bytes:
    """The stream itself, or with its slip mended. Raises Unreadable when it is not of the header's size."""
    if stream[:2] == b"\xff\xd8":
        return _check_jpeg(stream, rows, columns, samples)
    start = stream.find(_SOC_SIZ) if stream[:12] == _JP2 else 0
    if start >= 0 and stream[start : start + 4] == _SOC_SIZ:
        _check_jpeg2000(stream[start:], rows, columns, samples)
        return stream
    raise Unreadable("the compressed pixels are neither JPEG, JPEG-LS nor JPEG 2000; the file may be damaged")


def _check_same(found: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    if found != expected:
        raise Unreadable("the compressed pixels have another size than the header says; the file may be damaged")


def _check_jpeg2000(stream: bytes, rows: int, columns: int, samples: int) -> None:
    try:
        right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = struct.unpack(">8I", stream[8:40])
        (components,) = struct.unpack(">H", stream[40:42])
    except struct.error:
        raise Unreadable("truncated: the compressed pixels end within their header") from None
    _check_same((bottom - top, right - left, components), (rows, columns, samples))
    if not tile_width or not tile_height or tile_left > left or tile_top > top:
        raise Unreadable("the tiles of the JPEG 2000 stream make no sense; the file may be damaged")
    if -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height) > MAX_TILES:
        raise Unreadable(f"the JPEG 2000 stream has more than {MAX_TILES} tiles")


def _segments(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the segments with a length up to the first scan; start and end are of the content."""
    place = 2
    while place + 4 <= len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xFF:  # fill
            place += 1
            continue
        (length,) = struct.unpack(">H", stream[place + 2 : place + 4])
        yield marker, place + 4, place + 2 + length
        if marker == _SCAN:
            return
        place += 2 + max(length, 2)


def _check_jpeg(stream: bytes, rows: int, columns: int, samples: int) -> bytes:
    frame = None
    for marker, start, end in _segments(stream):
        if marker in _FRAMES:
            if frame is not None or end - start < 6 or end > len(stream):
                raise Unreadable("the compressed pixels do not begin as a JPEG image; the file may be damaged")
            frame = marker
            height, width, components = struct.unpack(">HHB", stream[start + 1 : start + 6])
            _check_same((height, width, components), (rows, columns, samples))
        if marker == _SCAN and frame is not None:
            # Some writers of 12-bit extended JPEG end the spectral band at 0, where T.81 (Table B.3) wants 63 and
            # decoders insist on it.
            if frame in _SEQUENTIAL and stream[end - 3 : end] == b"\0\0\0":
                return stream[: end - 2] + b"\x3f" + stream[end - 1 :]
            return stream
    raise Unreadable("the compressed pixels do not begin as a JPEG image; the file may be damaged")
