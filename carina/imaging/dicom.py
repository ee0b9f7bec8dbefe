"""One file -> one radiograph: float32, [0, 1], bright = dense, with the few facts of the header that may be kept.

DICOM (with or without preamble), PNG, JPEG, TIFF, BMP, NPY and the raw files of JSRT, told apart by content. A file
that cannot be used raises Unreadable with a reason that names no path and no text of the header.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import ExplicitVRBigEndian

from carina.imaging.dataset import Layout, read_file
from carina.imaging.header import Unreadable, code, numbers, reason, stored_range, text
from carina.imaging.listing import list_files
from carina.imaging.photometry import Photometry, by_range, develop, equalized
from carina.imaging.pictures import JSRT_BYTES, MAGIC, gray, plain, read_picture
from carina.imaging.pixeldata import decode
from carina.imaging.polarity import inverts

__all__ = ["Photometry", "Radiograph", "Unreadable", "list_files", "read_radiograph"]

MAX_BYTES = 2**30  # of a file; what is larger is a film sequence or damaged
MAX_AGE = 90.0  # a single age above 89 identifies (HIPAA Safe Harbor, 45 CFR 164.514(b)(2)(i)(C))
_KEPT = (  # the allow-list: nothing else of a header becomes a fact
    "ViewPosition", "ViewCodeSequence", "PatientSex", "PatientAge", "AcquisitionDate", "ContentDate", "StudyDate",
    "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio", "Manufacturer",
    "ManufacturerModelName", "Modality", "BodyPartExamined", "BurnedInAnnotation",
)  # fmt: skip
_VIEWS = {"POSTERO-ANTERIOR": "PA", "ANTERO-POSTERIOR": "AP", "LEFT LATERAL": "LL", "RIGHT LATERAL": "RL"}
# The defined terms of PS3.3 C.7.6.3.1.2; whatever else stands there is free text, which is not kept.
_PHOTOMETRIC = frozenset(
    ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
)
_YEARS = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0, "": 1.0}


@dataclass
class Radiograph:
    """image: (H, W) float32 in [0, 1], bright = dense. facts: the allow-list, nothing else of the header:

    view, sex ("F", "M", ""), age (years, 90 at most, or None), year (of the acquisition, or None), rows, columns,
    spacing ((row_mm, col_mm), or the two sides of PixelAspectRatio, of which only the ratio counts, or None), bits,
    photometric, manufacturer, modality, body_part, burned_in ("YES", "NO", ""), transfer_syntax, polarity ("ok",
    "suspicious", "contradictory"), window (words). rows and columns are those of `image`.
    patient and study are the raw identifiers, to be hashed, never to be stored.
    """

    image: np.ndarray
    facts: dict[str, Any]
    patient: str | None = field(default=None, repr=False)
    study: str | None = field(default=None, repr=False)


def read_radiograph(
    source: str | Path | bytes,
    photometry: Photometry = Photometry(),  # noqa: B008 (frozen)
) -> Radiograph:
    """Read one file of any kind that is known, or its bytes. Raises Unreadable with the reason for this file."""
    data = memoryview(source) if isinstance(source, bytes) else _read_bytes(Path(source))
    named_jsrt = not isinstance(source, bytes) and Path(source).suffix.lower() == ".img"
    kind = _kind(data, named_jsrt)
    with _quiet(), reason("the file cannot be read; it may be damaged"):
        radiograph = _read_dicom(data, photometry) if kind == "DICOM" else _read_plain(data, kind, photometry)
    _check_contrast(radiograph.image)
    return radiograph


def _read_bytes(path: Path) -> memoryview:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise Unreadable("not a regular file")
        if status.st_size > MAX_BYTES:
            raise Unreadable(f"the file has more than {MAX_BYTES} bytes")
        # numpy asks the system for large pages, which saves a third of the time that reading takes.
        content = np.empty(status.st_size, dtype=np.uint8)
        with open(path, "rb", buffering=0) as handle:
            filled = 0
            while filled < len(content) and (more := handle.readinto(content[filled:])):
                filled += more
        return memoryview(content)[:filled]
    except (OSError, ValueError) as error:
        raise Unreadable(f"the file cannot be opened ({getattr(error, 'strerror', None) or 'bad name'})") from None


def _kind(data: memoryview, named_jsrt: bool) -> str:
    head = bytes(data[:16])
    if data[128:132] == b"DICM":
        return "DICOM"
    if named_jsrt and len(data) == JSRT_BYTES:  # nothing else tells it
        return "JSRT"
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    if not head:
        raise Unreadable("the file is empty")
    # Without a preamble a data set starts with a low element of group 0002 or 0008, in one of the two byte orders.
    if len(head) >= 8 and ((head[:2] in (b"\x02\0", b"\x08\0") and head[3] == 0) or head[:3] == b"\0\x08\0"):
        return "DICOM"
    raise Unreadable("not an image (neither DICOM, PNG, JPEG, TIFF, BMP nor NPY)")


class _Quiet:
    """Silence what readers say while at least one thread reads: their warnings quote values of the header.

    Filters of warnings and levels of loggers belong to the process. Threads that each saved and restored them would
    undo one another's, so the first that enters silences and the last that leaves restores; in between, warnings of
    other code are silent as well.
    """

    def __init__(self) -> None:
        self.lock, self.depth = threading.Lock(), 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.depth:
                self._silence()
            self.depth += 1
        try:
            yield
        finally:
            with self.lock:
                self.depth -= 1
                if not self.depth:
                    self.saved.close()

    def _silence(self) -> None:
        self.saved = contextlib.ExitStack()
        self.saved.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("pydicom", "PIL"):
            logger = logging.getLogger(name)
            self.saved.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        opencv = cv2.utils.logging
        self.saved.callback(opencv.setLogLevel, opencv.getLogLevel())
        opencv.setLogLevel(opencv.LOG_LEVEL_SILENT)


_quiet = _Quiet()


def _check_contrast(image: np.ndarray) -> None:
    step = max(1, min(image.shape) // 64)
    sample = image[::step, ::step]
    # A sample cannot tell a constant picture from one with a single bright corner; all pixels can.
    if sample.min() == sample.max() and image.min() == image.max():
        raise Unreadable("every pixel has the same value")


def _read_plain(data: memoryview, kind: str, photometry: Photometry) -> Radiograph:
    picture = read_picture(data, kind, photometry)
    image, words = plain(picture, photometry)
    invert, polarity = inverts(image, picture.photometric)
    image = equalized(np.subtract(1.0, image, out=image) if invert else image, photometry.equalize)
    facts = _facts(image, Dataset(), picture.bits, picture.photometric, kind, polarity, words)
    return Radiograph(image, {**facts, "spacing": picture.spacing})


def _read_dicom(data: memoryview, photometry: Photometry) -> Radiograph:
    file = read_file(data)
    header = file.header
    with reason("the DICOM header cannot be read; the file may be damaged or truncated"):
        layout = Layout.of(header)
    layout.check()
    if layout.frames > 1 and photometry.frames == "reject":
        raise Unreadable(f"several frames ({layout.frames}); frames=first takes the first")
    stored, form = decode(file, layout)
    with reason("the header's description of gray values cannot be used"):
        bits, polarity = layout.bits, "ok"
        if form == "PALETTE COLOR":
            if "SegmentedRedPaletteColorLookupTableData" in header:  # a few bytes of it may expand to any length
                raise Unreadable("its palette is segmented; save it with a plain one, or as gray")
            stored = apply_color_lut(stored, header)
            bits = 8 * stored.dtype.itemsize
        if stored.ndim == 3:
            image, words = by_range(gray(stored), "full", stored_range(bits, False), bits)
            image = equalized(image, photometry.equalize)
        else:
            little = file.syntax != ExplicitVRBigEndian
            image, words, polarity = develop(stored, header, photometry, bits, little_endian=little)
        facts = _facts(image, header, bits, layout.photometric, file.syntax_name, polarity, words)
        patient, study = text(header, "PatientID"), text(header, "StudyInstanceUID")
    return Radiograph(image, facts, patient or None, study or None)


# --- facts --------------------------------------------------------------------------------------------------------


def _age(header: Dataset) -> float | None:
    """PatientAge in years: nnnD, nnnW, nnnM, nnnY, or a bare number of years; None when absent or beyond 120."""
    match = re.fullmatch(r"(\d{1,3})([DWMY]?)", text(header, "PatientAge").upper())
    years = float(match[1]) / _YEARS[match[2]] if match else None
    return min(years, MAX_AGE) if years is not None and years <= 120 else None


def _year(header: Dataset) -> int | None:
    """The year of the first usable date; archives that shift dates to protect patients write years of the future."""
    for keyword in ("AcquisitionDate", "ContentDate", "StudyDate"):
        match = re.match(r"(1[89]|2[0-3])\d\d(?=\W?[01]\d)", text(header, keyword))
        if match:
            return int(match[0])
    return None


def _spacing(header: Dataset) -> tuple[float, float] | None:
    """(row, column) of the first element that holds a usable pair; None without any, or with a ratio of 1 alone."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        pair = numbers(header, keyword)
        # Pixels are square or nearly so; a ratio beyond 4 is a slip of the writer and would distort the picture.
        if len(pair) == 2 and min(pair) > 0 and 0.25 <= pair[0] / pair[1] <= 4:
            return (pair[0], pair[1]) if keyword != "PixelAspectRatio" or pair[0] != pair[1] else None
    return None


def _allowed(header: Dataset) -> Dataset:
    """The allow-list of a header; an element that cannot be read is as good as absent, since no picture hangs on it."""
    kept = Dataset()
    for keyword in _KEPT:
        with contextlib.suppress(Exception):
            kept[keyword] = header[keyword]
    return kept


def _facts(
    image: np.ndarray, header: Dataset, bits: int, photometric: str, syntax: str, polarity: str, words: str
) -> dict[str, Any]:
    header = _allowed(header)
    view = code(header, "ViewPosition")
    if not view and header.get("ViewCodeSequence"):
        view = _VIEWS.get(text(header.ViewCodeSequence[0], "CodeMeaning").upper(), "")
    sex, burned_in = code(header, "PatientSex"), code(header, "BurnedInAnnotation")
    maker = " ".join(text(header, keyword) for keyword in ("Manufacturer", "ManufacturerModelName")).strip()
    return {
        "view": view,
        "sex": sex if sex in ("F", "M") else "",
        "age": _age(header),
        "year": _year(header),
        "rows": image.shape[0],
        "columns": image.shape[1],
        "spacing": _spacing(header),
        "bits": bits,
        "photometric": photometric if photometric in _PHOTOMETRIC else "",
        "manufacturer": maker[:64],
        "modality": code(header, "Modality"),
        "body_part": code(header, "BodyPartExamined"),
        "burned_in": burned_in if burned_in in ("YES", "NO") else "",
        "transfer_syntax": syntax,
        "polarity": polarity,
        "window": words,
    }
