"""One file -> one radiograph: float32, [0, 1], bright = dense, with the few facts of the header that may be kept.

DICOM (with or without preamble), PNG, JPEG, TIFF, BMP and NPY, told apart by content. A file that cannot be used
raises Unreadable with a reason that names no path and no text of the header.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from carina.errors import CarinaError
from carina.imaging.photometry import Photometry, Unreadable, by_range, develop, orient, stored_range, text

__all__ = ["Photometry", "Radiograph", "Unreadable", "list_files", "read_radiograph"]

MIN_SIDE = 32
MAX_PIXELS = 2**28
MAX_ASPECT = 16

_IMAGES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"BM": "BMP",
    b"\x93NUMPY": "NPY",
}
_LUMA = np.array([[0.299, 0.587, 0.114]], dtype=np.float32)  # ITU-R BT.601
_VIEWS = {"POSTERO-ANTERIOR": "PA", "ANTERO-POSTERIOR": "AP", "LEFT LATERAL": "LL", "RIGHT LATERAL": "RL"}
_YEARS = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0, "": 1.0}
_NOT_IMAGES = re.compile(
    r"\.(csv|tsv|jsonl?|ndjson|txt|xml|md|rst|html?|css|pdf|docx?|xlsx?|log|ini|cfg|toml|ya?ml|py|ipynb|sh|"
    r"zip|gz|bz2|xz|zst|tar|7z|rar|parquet|arrow|feather|db|sqlite|sql|pkl|npz|h5|hdf5|pth?|safetensors|"
    r"md5|sha256|tmp|part)",
    re.IGNORECASE,
)
_NOT_IMAGE_NAMES = {"DICOMDIR", "THUMBS.DB", "DESKTOP.INI", "LICENSE", "LICENCE", "README", "CHANGELOG", "MAKEFILE"}


@dataclass
class Radiograph:
    """image: (H, W) float32 in [0, 1], bright = dense. facts: the allow-list, nothing else of the header:

    view, sex ("F", "M", ""), age (years or None), rows, columns, spacing ((row_mm, col_mm) or None), bits, photometric,
    manufacturer, modality, body_part, transfer_syntax, polarity ("ok", "suspicious", "contradictory"), window (words).
    rows and columns are those of `image`. patient and study are the raw identifiers, to be hashed, never to be stored.
    """

    image: np.ndarray
    facts: dict[str, Any]
    patient: str | None = field(default=None, repr=False)
    study: str | None = field(default=None, repr=False)


def read_radiograph(path: str | Path, photometry: Photometry = Photometry()) -> Radiograph:  # noqa: B008 (frozen)
    """Read one file of any kind that is known. Raises Unreadable with the reason for this file."""
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            head = handle.read(132)
    except OSError as error:
        raise Unreadable(f"the file cannot be opened ({error.strerror})") from None
    kind = _kind(head)
    with _quiet():
        if kind == "DICOM":
            radiograph = _read_dicom(path, photometry)
        else:
            values, bits, photometric = _read_array(path) if kind == "NPY" else _read_raster(path, photometry)
            image, words = _plain(values, bits, photometry)
            image, polarity = orient(image, "MONOCHROME2")
            facts = _facts(image, Dataset(), bits, photometric, kind, polarity, words)
            radiograph = Radiograph(image, facts)
    # A sample cannot tell a constant picture from one with a single bright corner; the extremes can, and are cheap.
    low, high = radiograph.image.min(), radiograph.image.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise Unreadable("some pixels are not finite numbers")
    if low == high:
        raise Unreadable("every pixel has the same value")
    return radiograph


def _kind(head: bytes) -> str:
    if head[128:132] == b"DICM":
        return "DICOM"
    for magic, kind in _IMAGES.items():
        if head.startswith(magic):
            return kind
    if not head:
        raise Unreadable("the file is empty")
    # Without a preamble a data set starts with a low element of group 0002 or 0008, in one of the two byte orders.
    if len(head) >= 8 and ((head[:2] in (b"\x02\0", b"\x08\0") and head[3] == 0) or head[:3] == b"\0\x08\0"):
        return "DICOM"
    raise Unreadable("not an image (neither DICOM, PNG, JPEG, TIFF, BMP nor NPY)")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what readers say: their warnings quote values of the header."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _reason(reason: str) -> Iterator[None]:
    """Turn whatever a reader raises into Unreadable; the error's own text may quote the header, so its class must do.

    Decoders written in Rust end in a PanicException, which is no Exception.
    """
    try:
        yield
    except (Unreadable, CarinaError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise Unreadable(f"{reason} ({type(error).__name__})") from None


def _check_size(rows: int, columns: int) -> None:
    if rows * columns > MAX_PIXELS:
        raise Unreadable(f"the picture would have more than {MAX_PIXELS} pixels")
    if min(rows, columns) < MIN_SIDE:
        raise Unreadable(f"the picture has a side of fewer than {MIN_SIDE} pixels")
    if max(rows, columns) > MAX_ASPECT * min(rows, columns):
        raise Unreadable(f"one side of the picture is more than {MAX_ASPECT} times the other")


def _gray(color: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W) float32 in the units of `color`; exact where the three channels are equal."""
    gray = cv2.transform(color.astype(np.float32), _LUMA)
    return np.where((color == color[..., :1]).all(axis=-1), color[..., 0].astype(np.float32), gray)


# --- DICOM --------------------------------------------------------------------------------------------------------


def _read_dicom(path: Path, photometry: Photometry) -> Radiograph:
    with _reason("the DICOM header cannot be read; the file may be damaged or truncated"):
        header = pydicom.dcmread(path, force=True)
        if not header.get("PixelData"):
            cut = "Rows" in header
            raise Unreadable("truncated: its pixels are not all there" if cut else "a DICOM object without pixels")
        syntax = _transfer_syntax(header)
        packed = syntax.is_encapsulated
        rows, columns = int(header.Rows), int(header.Columns)
        samples, frames = int(header.get("SamplesPerPixel") or 1), int(header.get("NumberOfFrames") or 1)
        allocated, photometric = int(header.BitsAllocated), _code(header, "PhotometricInterpretation")
        bits = int(header.get("BitsStored") or allocated)
    _check_size(rows, columns)
    if samples not in (1, 3) or not 1 <= bits <= allocated <= 32:
        raise Unreadable("the header describes pixels of an unknown form")
    if frames > 1 and photometry.frames == "reject":
        raise Unreadable(f"several frames ({frames}); frames=first takes the first")
    stored_samples = 2 if photometric == "YBR_FULL_422" else samples
    if not packed and len(header.PixelData) < rows * columns * stored_samples * allocated // 8:
        raise Unreadable("truncated: there are fewer bytes than pixels")

    stored, form = _decode(header, syntax, bits, allocated)
    if stored.dtype.kind not in "ui" or stored.shape[:2] != (rows, columns):
        raise Unreadable("the decoded pixels do not have the form that the header describes")
    with _reason("the header's description of gray values cannot be used"):
        if form == "PALETTE COLOR":
            stored = apply_color_lut(stored, header)
            bits = 8 * stored.dtype.itemsize
        if stored.ndim == 3:
            image, words = by_range(_gray(stored), "full", stored_range(bits, False), bits)
            polarity = "ok"
        else:
            little = syntax != ExplicitVRBigEndian
            image, words, polarity = develop(stored, header, photometry, bits, little_endian=little)
        name = syntax.name if syntax.name != str(syntax) else "private"
        facts = _facts(image, header, bits, photometric, name, polarity, words)
        patient, study = text(header, "PatientID"), text(header, "StudyInstanceUID")
    return Radiograph(image, facts, patient or None, study or None)


def _transfer_syntax(header: Dataset) -> UID:
    """The transfer syntax of the file meta; without one, the plain syntax in which the data set was found to be."""
    meta = getattr(header, "file_meta", None)
    if meta is None:
        meta = header.file_meta = FileMetaDataset()
    if not meta.get("TransferSyntaxUID"):
        implicit, little = header.original_encoding
        meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        )
    return meta.TransferSyntaxUID


def _decode(header: Dataset, syntax: UID, bits: int, allocated: int) -> tuple[np.ndarray, str]:
    """The first frame's stored values, (H, W) or (H, W, 3), and the photometric interpretation that they now have."""
    name = syntax.name if syntax.name != str(syntax) else "a private syntax"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Unreadable(f"the transfer syntax ({name}) is not one for still pictures that can be decoded") from None
    if not decoder.is_available:
        extra = "carina-cxr[codecs]" if "JPEG" in name and "2000" not in name else "pylibjpeg-openjpeg pylibjpeg-rle"
        raise Unreadable(f"the transfer syntax {name} needs a decoder: pip install {extra}")
    hint = "the file may be damaged or truncated"
    if "Extended" in name and bits > 8:
        hint = "12-bit JPEG Extended is beyond most codecs; save it in a lossless syntax"
    with _reason(f"the pixels ({name}) cannot be decoded; {hint}"):
        # Stored bits may sit high in the word (HighBit): take all up to the high bit, then shift.
        shift = int(header.get("HighBit") or 0) + 1 - bits
        shift = shift if 0 < shift <= allocated - bits and not syntax.is_encapsulated else 0
        header.BitsStored = bits + shift
        stored, described = decoder.as_array(header, index=0)
        header.BitsStored = bits
    return stored >> shift if shift else stored, str(described["photometric_interpretation"])


def _code(header: Dataset, keyword: str) -> str:
    """A code string: upper case, letters, digits, space and underscore, 32 at most."""
    return re.sub(r"[^A-Z0-9_]+", " ", text(header, keyword).upper()).strip()[:32]


def _age(header: Dataset) -> float | None:
    """PatientAge in years: nnnD, nnnW, nnnM, nnnY, or a bare number of years; None when absent or beyond 120."""
    match = re.fullmatch(r"(\d{1,3})([DWMY]?)", text(header, "PatientAge").upper())
    years = float(match[1]) / _YEARS[match[2]] if match else None
    return years if years is not None and years <= 120 else None


def _spacing(header: Dataset) -> tuple[float, float] | None:
    """(row_mm, col_mm) from the first element that holds a usable pair; None without any."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        try:
            row, column = (float(value) for value in header.get(keyword) or ())
        except (TypeError, ValueError):
            continue
        # Pixels are square or nearly so; a ratio beyond 4 is a slip of the writer and would distort the picture.
        if 0 < row < np.inf and 0 < column < np.inf and 0.25 <= row / column <= 4:
            return row, column
    return None


def _facts(
    image: np.ndarray, header: Dataset, bits: int, photometric: str, syntax: str, polarity: str, words: str
) -> dict[str, Any]:
    view = _code(header, "ViewPosition")
    if not view and header.get("ViewCodeSequence"):
        view = _VIEWS.get(text(header.ViewCodeSequence[0], "CodeMeaning").upper(), "")
    sex = _code(header, "PatientSex")
    maker = " ".join(text(header, keyword) for keyword in ("Manufacturer", "ManufacturerModelName")).strip()
    return {
        "view": view,
        "sex": sex if sex in ("F", "M") else "",
        "age": _age(header),
        "rows": image.shape[0],
        "columns": image.shape[1],
        "spacing": _spacing(header),
        "bits": bits,
        "photometric": photometric,
        "manufacturer": maker[:64],
        "modality": _code(header, "Modality"),
        "body_part": _code(header, "BodyPartExamined"),
        "transfer_syntax": syntax,
        "polarity": polarity,
        "window": words,
    }


# --- everyday picture files ---------------------------------------------------------------------------------------


def _plain(values: np.ndarray, bits: int, photometry: Photometry) -> tuple[np.ndarray, str]:
    """(H, W) numbers without a header -> [0, 1] and words. bits 0 says floats; those within [0, 1] stay as they are."""
    if not np.isfinite(values).all():
        raise Unreadable("some pixels are not finite numbers")
    low, high = float(values.min()), float(values.max())
    if bits == 0 and low >= 0 and high <= 1 and photometry.window != "percentile":
        return values.astype(np.float32), "as stored"
    known = 0 < bits <= 16 and low >= 0 and high < 2**bits
    return by_range(values, photometry.window, (0.0, 2.0**bits - 1) if known else (low, high), bits or 32)


def _read_array(path: Path) -> tuple[np.ndarray, int, str]:
    with _reason("the NPY file cannot be read; it may be damaged, truncated or hold objects"):
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    if values.ndim != 2 or values.dtype.kind not in "buif":
        raise Unreadable("the NPY file does not hold one (H, W) array of numbers")
    _check_size(*values.shape)
    kind, size = values.dtype.kind, values.dtype.itemsize
    bits = {"b": 1, "f": 0}.get(kind, 8 * size)
    return np.array(values, dtype=np.uint8 if kind == "b" else None), bits, "MONOCHROME2"


def _read_raster(path: Path, photometry: Photometry) -> tuple[np.ndarray, int, str]:
    """PNG, JPEG, TIFF, BMP -> ((H, W) values, bits, what they were). EXIF orientation and alpha are applied."""
    with _reason("the picture cannot be decoded; the file may be damaged or truncated"):
        try:
            picture = Image.open(path, formats=("PNG", "JPEG", "TIFF", "BMP"))
        except Image.DecompressionBombError:
            raise Unreadable("the picture has more pixels than Pillow takes for safe") from None
        with picture:
            _check_size(picture.height, picture.width)
            if picture.format == "TIFF" and getattr(picture, "n_frames", 1) > 1 and photometry.frames == "reject":
                raise Unreadable("several frames; frames=first takes the first")
            photometric = "RGB" if len(picture.getbands()) >= 3 else "MONOCHROME2"
            photometric = "PALETTE COLOR" if picture.mode in ("P", "PA") else photometric
            # Pillow keeps 8 of the 16 bits of a color picture; OpenCV keeps all.
            if photometric == "RGB" and _is_deep(picture):
                values, bits = _deep_color(path), 16
            else:
                values, bits = _shallow(picture)
            orientation = picture.getexif().get(0x0112, 1)
    return _turn(values, orientation), bits, photometric


def _is_deep(picture: Image.Image) -> bool:
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(258, (8,))) == 16
    return any(";16" in str(tile[3]) for tile in picture.tile)


def _deep_color(path: Path) -> np.ndarray:
    pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3 or pixels.dtype != np.uint16:
        raise Unreadable("the 16-bit color picture cannot be decoded; the file may be damaged or truncated")
    gray = _gray(pixels[..., 2::-1])
    return gray * (pixels[..., 3].astype(np.float32) / 65535) if pixels.shape[2] == 4 else gray


def _shallow(picture: Image.Image) -> tuple[np.ndarray, int]:
    """Values and bits of any Pillow mode. Transparent pixels become 0, like air."""
    inverted = picture.format == "TIFF" and picture.tag_v2.get(262) == 0 and picture.mode.startswith("I")
    picture.load()
    if picture.mode == "F":
        return np.asarray(picture, dtype=np.float32), 0
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            return values, 32
        # Pillow undoes "white is zero" for 8 bits only.
        return (65535 - values.astype(np.int32) if inverted else values), 16
    if picture.mode in ("1", "L") and "transparency" not in picture.info:
        return np.asarray(picture.convert("L")), 8
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        pixels = np.asarray(picture.convert("RGBA"))
        return _gray(pixels[..., :3]) * (pixels[..., 3].astype(np.float32) / 255), 8
    return _gray(np.asarray(picture.convert("RGB"))), 8


def _turn(values: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the EXIF orientation (1 to 8, TIFF 6.0 tag 274)."""
    if orientation in (5, 6, 7, 8):
        values = values.T
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return np.ascontiguousarray(values)


# --- which files --------------------------------------------------------------------------------------------------


def list_files(source: str | Path) -> list[Path]:
    """The candidate files of a folder (recursive), a glob, or one file, sorted by path.

    Hidden files and folders, DICOMDIR and what is plainly no picture by its suffix (.csv, .json, .zip ...) are left
    out; whether the rest can be read shows when it is. Links are followed; a file that can be reached by several ways
    is listed once, by the shortest. Raises CarinaError when there is nothing.
    """
    path = Path(source)
    if path.is_dir():
        found = [file for file in _walk(path) if _candidate(file.name)]
    elif path.is_file():
        return [path]
    elif glob.has_magic(str(source)):
        found = [Path(name) for name in glob.glob(str(source), recursive=True)]
        found = [file for file in found if _candidate(file.name) and file.is_file()]
    else:
        raise CarinaError(f"{source} is not there; give a folder, a file, or a glob in quotes")
    if not found:
        raise CarinaError(f"{source} holds no file that could be a picture; check the path")
    once: dict[str, Path] = {}
    for file in sorted(found, key=lambda file: (len(file.parts), file.as_posix())):
        once.setdefault(os.path.realpath(file), file)
    return sorted(once.values(), key=lambda file: file.as_posix())


def _candidate(name: str) -> bool:
    suffix = os.path.splitext(name)[1]
    return not (name.startswith(".") or name.upper() in _NOT_IMAGE_NAMES or _NOT_IMAGES.fullmatch(suffix))


def _walk(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in names if (Path(parent) / name).is_file())
