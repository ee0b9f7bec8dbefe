"""The stored values of the first frame of a DICOM file, in every transfer syntax for which a decoder is at hand.

Nothing is allocated by what a header or a code stream claims before it has been compared with what is there.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import ExplicitVRBigEndian, RLELossless

from carina.imaging.codestreams import check_stream
from carina.imaging.dataset import PIXEL_DATA, File, Layout
from carina.imaging.header import Unreadable, reason, stored_range

_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


def decode(file: File, layout: Layout) -> tuple[np.ndarray, str]:
    """The first frame's stored values, (H, W) or (H, W, 3), and the photometric interpretation that they now have."""
    if not file.syntax.is_encapsulated:
        stored, photometric = _decode_plain(file, layout)
    else:
        frame = _first_frame(file, layout)
        with reason(f"the pixels ({file.syntax_name}) cannot be decoded; the file may be damaged or truncated"):
            if file.syntax == RLELossless:
                stored, photometric = _decode_rle(frame, layout)
            else:
                frame = check_stream(frame, layout.rows, layout.columns, layout.samples)
                stored, photometric = _by_pydicom(file, encapsulate([frame], has_bot=False), "OB")
    expected = (layout.rows, layout.columns) + ((3,) if layout.samples == 3 else ())
    if stored.dtype.kind not in "ui" or stored.shape != expected:
        raise Unreadable("the decoded pixels do not have the form that the header describes")
    return stored, photometric


def _decode_plain(file: File, layout: Layout) -> tuple[np.ndarray, str]:
    if file.length is None:
        raise Unreadable("its pixels are packed as if compressed, but its transfer syntax says that they are not")
    content = file.data[file.start :][: file.length]
    if len(content) < layout.frame_bytes:
        raise Unreadable("truncated: there are fewer bytes than pixels")
    big = file.syntax == ExplicitVRBigEndian
    if layout.samples == 1 and (layout.allocated in (16, 32) or (layout.allocated == 8 and not big)):
        words = np.frombuffer(content, f"{'>' if big else '<'}u{layout.allocated // 8}", layout.rows * layout.columns)
        words = words.reshape(layout.rows, layout.columns)
        return _without_litter(words.astype(words.dtype.newbyteorder("="), copy=False), layout), layout.photometric
    with reason(f"the pixels ({file.syntax_name}) cannot be decoded; the file may be damaged or truncated"):
        return _by_pydicom(file, bytes(content[: layout.frame_bytes + layout.frame_bytes % 2]), file.vr)


def _without_litter(words: np.ndarray, layout: Layout) -> np.ndarray:
    """Unsigned words -> stored values: what stands above the high bit (overlays) and below the stored bits goes."""
    size = layout.allocated
    words = words.view(words.dtype.str.replace("u", "i")) if layout.signed else words
    high = layout.high_bit if layout.bits - 1 <= layout.high_bit < size else layout.bits - 1
    low, top = stored_range(layout.bits, layout.signed)
    if high == layout.bits - 1 and (layout.bits == size or (words.min() >= low and words.max() <= top)):
        return words
    # Shifted up until the high bit is the word's own, then down: the sign comes along.
    return (words << (size - 1 - high)) >> (size - layout.bits)


def _by_pydicom(file: File, content: bytes, vr: str) -> tuple[np.ndarray, str]:
    try:
        decoder = get_decoder(file.syntax)
    except NotImplementedError:
        name = file.syntax_name
        raise Unreadable(f"the transfer syntax ({name}) is not one for still pictures that can be decoded") from None
    if not decoder.is_available:
        extra = "pylibjpeg-openjpeg" if "2000" in file.syntax_name else "carina-cxr[codecs]"
        raise Unreadable(f"the transfer syntax {file.syntax_name} needs a decoder: pip install {extra}")
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = file.syntax
    for keyword in (
        "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation",
        "PhotometricInterpretation", "PlanarConfiguration",
    ):  # fmt: skip
        if keyword in file.header:
            one[keyword] = file.header[keyword]
    one.SamplesPerPixel = one.get("SamplesPerPixel") or 1
    one.BitsStored = one.get("BitsStored") or one.BitsAllocated
    one.PixelRepresentation = one.get("PixelRepresentation") or 0
    one.add_new(PIXEL_DATA, vr, content)
    stored, described = decoder.as_array(one, index=0)
    return stored, str(described["photometric_interpretation"])


def _first_frame(file: File, layout: Layout) -> bytes:
    """The code stream of the first frame (PS3.5 A.4: an offset table, then fragments)."""
    content = file.data[file.start :][: file.length]
    fragments, place = [], 0
    while content[place : place + 4] == _ITEM and place + 8 <= len(content):
        length = int.from_bytes(content[place + 4 : place + 8], "little")
        if place + 8 + length > len(content):
            raise Unreadable("truncated: its pixels are not all there")
        fragments.append(content[place + 8 : place + 8 + length])
        place += 8 + length
    if file.length is None and content[place : place + 4] != _END:
        raise Unreadable("truncated: its pixels are not all there")
    if len(fragments) < 2:
        raise Unreadable("the compressed pixels are not in the form that the standard wants; the file may be damaged")
    if layout.frames == 1:
        return b"".join(fragments[1:])
    with reason("the first frame cannot be found among the compressed pixels; the file may be damaged"):
        offsets = _extended_offsets(file.header)
        return get_frame(bytes(content[:place]), 0, number_of_frames=layout.frames, extended_offsets=offsets)


def _extended_offsets(header: Dataset) -> Any:
    offsets, lengths = header.get("ExtendedOffsetTable"), header.get("ExtendedOffsetTableLengths")
    return (offsets, lengths) if offsets and lengths else None


def _decode_rle(frame: bytes, layout: Layout) -> tuple[np.ndarray, str]:
    """PS3.5 Annex G: one PackBits segment for each byte of a sample, the most significant first.

    Decoded by Pillow, as a picture of one row for a segment, since some writers let runs cross rows. It is as fast as
    pylibjpeg-rle 2.2, which panics on damaged segments.
    """
    pixels, width = layout.rows * layout.columns, layout.allocated // 8
    count = int.from_bytes(frame[:4], "little")
    if len(frame) < 64 or layout.allocated % 8 or count != layout.samples * width:
        raise Unreadable("the RLE header does not fit the pixels that the header describes; the file may be damaged")
    starts = [*np.frombuffer(frame, "<u4", count, 4).tolist(), len(frame)]
    samples: list[np.ndarray] = []
    for number, (start, stop) in enumerate(pairwise(starts)):
        # Two bytes make 128 at most: a segment too short for its pixels is told before they are allocated.
        if not 64 <= start < stop <= len(frame) or (stop - start) * 64 < pixels:
            raise Unreadable("an RLE segment is shorter than its pixels; the file may be damaged or truncated")
        plane = np.asarray(Image.frombytes("L", (pixels, 1), frame[start:stop], "packbits", "L"))[0]
        if number % width == 0:
            samples.append(plane.astype(f"u{width}"))
        else:
            samples[-1] <<= 8
            samples[-1] |= plane
    if layout.samples == 1:
        return _without_litter(samples[0].reshape(layout.rows, layout.columns), layout), layout.photometric
    color = np.stack(samples, axis=-1).reshape(layout.rows, layout.columns, 3)
    if layout.photometric.startswith("YBR") and width == 1:
        return convert_color_space(color, layout.photometric, "RGB"), "RGB"
    return color, layout.photometric
