"""From the bytes of a DICOM file to its header, up to the pixels, and what it says of their form.

Nothing is allocated by what a header or a code stream claims before it has been compared with what is there.
"""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from carina.imaging.header import MAX_PIXELS, Unreadable, check_size, code, reason, value

MAX_INFLATED = 2**29  # bytes of a deflated data set: four times those of the largest picture at 16 bits
MAX_READS = 100_000  # steps of reading a header; the largest real ones take a few thousand
MAX_WIDE = 2**24  # values of more than 16 bits, which no radiograph has and which take several times the memory
PIXEL_DATA = 0x7FE00010
_PIXELS = (0x7FE00008, 0x7FE00009, PIXEL_DATA)  # doubles, floats, integers
_UNDEFINED = 0xFFFFFFFF


@dataclass
class File:
    """A data set up to its pixels. start and length: where their value stands in `data`; length None is undefined."""

    header: Dataset
    syntax: UID
    data: memoryview
    start: int
    length: int | None
    vr: str

    @property
    def syntax_name(self) -> str:
        """The name of the transfer syntax; one that has none is not quoted."""
        return self.syntax.name if self.syntax.name != str(self.syntax) else "private"


@dataclass(frozen=True)
class Layout:
    """What the header says of the form of the pixels."""

    rows: int
    columns: int
    samples: int
    frames: int
    allocated: int
    bits: int
    high_bit: int
    signed: bool
    photometric: str

    @classmethod
    def of(cls, header: Dataset) -> Layout:
        for keyword in ("Rows", "Columns", "BitsAllocated"):
            if value(header, keyword) is None:
                raise Unreadable(f"the header does not say {keyword}, without which its pixels cannot be read")
        allocated = int(header.BitsAllocated)
        bits = int(header.get("BitsStored") or allocated)
        high = header.get("HighBit")
        return cls(
            int(header.Rows),
            int(header.Columns),
            int(header.get("SamplesPerPixel") or 1),
            int(header.get("NumberOfFrames") or 1),
            allocated,
            bits,
            bits - 1 if high is None else int(high),
            bool(header.get("PixelRepresentation")),
            code(header, "PhotometricInterpretation"),
        )

    def check(self) -> None:
        check_size(self.rows, self.columns)
        if self.samples not in (1, 3) or not 1 <= self.bits <= self.allocated <= 32 or self.frames < 1:
            raise Unreadable("the header describes pixels of an unknown form")
        limit = MAX_PIXELS if self.allocated <= 16 else MAX_WIDE
        if self.rows * self.columns * self.samples > limit:
            raise Unreadable(f"the picture would have more than {limit} values of {self.allocated} bits")

    @property
    def frame_bytes(self) -> int:
        samples = 2 if self.photometric == "YBR_FULL_422" else self.samples
        return -(-self.rows * self.columns * samples * self.allocated // 8)


class _Stream:
    """The bytes of a file for pydicom, which may take only so many steps and never all the rest at once."""

    def __init__(self, data: memoryview):
        self.data, self.place, self.steps = data, 0, 0

    def read(self, size: int = -1) -> bytes:
        self.steps += 1
        if self.steps > MAX_READS:
            raise Unreadable("its header does not come to an end; the file may be damaged")
        if size < 0:
            raise _Deflated
        found = bytes(self.data[self.place : self.place + size])
        self.place += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = max(0, offset + (0, self.place, len(self.data))[whence])
        return self.place

    def tell(self) -> int:
        return self.place


class _Deflated(Exception):
    """pydicom is about to inflate the rest of the file, to whatever size that has."""


class _AtPixels:
    """Where reading the header stopped: at the pixels, with their VR and length."""

    start: int | None = None
    length: int | None = None
    vr = "OW"

    def __init__(self, stream: _Stream):
        self.stream = stream

    def __call__(self, tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag not in _PIXELS:
            return False
        self.start, self.length, self.vr = self.stream.tell(), None if length == _UNDEFINED else length, vr or "OW"
        if tag != PIXEL_DATA:
            raise Unreadable("its pixels are floating-point numbers, which no radiograph has")
        return True


def _inflate(data: memoryview) -> memoryview:
    with reason("the deflated data set cannot be inflated; the file may be damaged or truncated"):
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflated = inflater.decompress(data, MAX_INFLATED)
    if inflater.unconsumed_tail:
        raise Unreadable(f"the deflated data set would have more than {MAX_INFLATED} bytes")
    return memoryview(inflated)


def read_file(data: memoryview) -> File:
    """Parse a DICOM file, with or without preamble and file meta, up to its pixels. Raises Unreadable."""
    with reason("the DICOM header cannot be read; the file may be damaged or truncated"):
        stream = _Stream(data)
        stop = _AtPixels(stream)
        header: Dataset | None = None
        with contextlib.suppress(_Deflated):
            header = read_partial(stream, stop_when=stop, force=True)
        if header is not None:
            syntax = _transfer_syntax(header)
        else:
            data = _inflate(data[stream.tell() :])
            stream = _Stream(data)
            stop = _AtPixels(stream)
            header = read_dataset(stream, is_implicit_VR=False, is_little_endian=True, stop_when=stop)
            syntax = DeflatedExplicitVRLittleEndian
        if not syntax.is_transfer_syntax:
            raise Unreadable("its transfer syntax is private or unknown; save it in one of the standard's")
        if not stop.start or stop.length == 0:
            cut = "Rows" in header
            raise Unreadable("truncated: its pixels are not all there" if cut else "a DICOM object without pixels")
    return File(header, syntax, data, stop.start, stop.length, stop.vr)


def _transfer_syntax(header: Dataset) -> UID:
    """The transfer syntax of the file meta; without one, the plain syntax in which the data set was found to be."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax:
        return syntax
    implicit, little = header.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
