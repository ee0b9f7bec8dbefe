"""The everyday picture formats: PNG, JPEG, TIFF, BMP, NPY, and the raw files of the JSRT database."""

from __future__ import annotations

import io
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from carina.imaging.header import Unreadable, check_size, reason
from carina.imaging.photometry import Photometry, by_range

MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"BM": "BMP",
    b"\x93NUMPY": "NPY",
}
JSRT_BYTES = 2048 * 2048 * 2
_LUMA = np.array([[0.299, 0.587, 0.114]], dtype=np.float32)  # ITU-R BT.601
_ROWS = 256  # rows of a color picture that are turned into gray at a time, to hold few of them as floats


@dataclass(frozen=True)
class Picture:
    """values: (H, W) numbers. bits: how many each holds, 0 for floats. photometric: in the words of DICOM."""

    values: np.ndarray
    bits: int
    photometric: str = "MONOCHROME2"
    spacing: tuple[float, float] | None = None


def gray(color: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W) float32 in the units of `color`; exact where the three channels are equal."""
    result = np.empty(color.shape[:2], dtype=np.float32)
    for top in range(0, len(color), _ROWS):
        part = color[top : top + _ROWS]
        equal = (part == part[..., :1]).all(axis=-1)
        result[top : top + _ROWS] = np.where(equal, part[..., 0], cv2.transform(part.astype(np.float32), _LUMA))
    return result


def read_picture(data: memoryview, kind: str, photometry: Photometry) -> Picture:
    """Decode the bytes of a file of one of the kinds of MAGIC, or of "JSRT". Raises Unreadable with the reason."""
    if kind == "JSRT":
        return _read_jsrt(data)
    if kind == "NPY":
        return _read_array(data)
    return _read_raster(data, photometry)


def plain(picture: Picture, photometry: Photometry) -> tuple[np.ndarray, str]:
    """Numbers without a header -> ((H, W) float32 in [0, 1], words). Floats within [0, 1] stay as they are."""
    values, bits = picture.values, picture.bits
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise Unreadable("some pixels are not finite numbers")
    if bits == 0 and low >= 0 and high <= 1 and photometry.window != "percentile":
        return values.astype(np.float32), "as stored"
    known = 0 < bits <= 16 and low >= 0 and high < 2**bits
    full = (0.0, 2.0**bits - 1) if known else (low, high)
    image, words = by_range(values, photometry.window, full, bits or 32)
    return image.astype(np.float32, copy=False), words


def _read_jsrt(data: memoryview) -> Picture:
    """2048 x 2048 pixels of 12 bits, big-endian, of 0.175 mm; a high value is dark film (Shiraishi et al., AJR 2000)."""
    values = np.frombuffer(data, dtype=">u2").reshape(2048, 2048).astype(np.uint16)
    if values.max() > 4095:
        raise Unreadable("it has the name and the size of a JSRT file, but some pixels have more than 12 bits")
    return Picture(values, 12, "MONOCHROME1", (0.175, 0.175))


def _read_array(data: memoryview) -> Picture:
    with reason("the NPY file cannot be read; it may be damaged or truncated"):
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[version](stream)
        if len(shape) != 2 or dtype.kind not in "buif":
            raise Unreadable("the NPY file does not hold one (H, W) array of numbers")
        check_size(*shape)
        values = np.frombuffer(data, dtype, count=shape[0] * shape[1], offset=stream.tell())
        values = values.reshape(shape, order="F" if by_columns else "C")
    bits = {"b": 1, "f": 0}.get(dtype.kind, 8 * dtype.itemsize)
    if dtype.kind == "b":
        values = values.view(np.uint8) != 0
    return Picture(np.ascontiguousarray(values, dtype=np.uint8 if dtype.kind == "b" else dtype.newbyteorder("=")), bits)


def _read_raster(data: memoryview, photometry: Photometry) -> Picture:
    """PNG, JPEG, TIFF, BMP. EXIF orientation and alpha are applied."""
    with reason("the picture cannot be decoded; the file may be damaged or truncated"):
        try:
            picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF", "BMP"))
        except Image.DecompressionBombError:
            raise Unreadable("the picture has more pixels than Pillow takes for safe") from None
        with picture:
            check_size(picture.height, picture.width)
            if picture.format == "TIFF" and getattr(picture, "n_frames", 1) > 1 and photometry.frames == "reject":
                raise Unreadable("several frames; frames=first takes the first")
            photometric = "RGB" if len(picture.getbands()) >= 3 else "MONOCHROME2"
            photometric = "PALETTE COLOR" if picture.mode in ("P", "PA") else photometric
            # Pillow keeps 8 of the 16 bits of a color picture; OpenCV keeps all.
            if photometric == "RGB" and _is_deep(picture):
                values, bits = _deep_color(data), 16
            else:
                values, bits = _shallow(picture)
            orientation = picture.getexif().get(0x0112, 1)
    return Picture(_turn(values, orientation), bits, photometric)


def _is_deep(picture: Image.Image) -> bool:
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(258, (8,))) == 16
    return any(";16" in str(tile[3]) for tile in picture.tile)


def _deep_color(data: memoryview) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3 or pixels.dtype != np.uint16:
        raise Unreadable("the 16-bit color picture cannot be decoded; the file may be damaged or truncated")
    values = gray(pixels[..., 2::-1])
    return values * (pixels[..., 3].astype(np.float32) / 65535) if pixels.shape[2] == 4 else values


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
        return gray(pixels[..., :3]) * (pixels[..., 3].astype(np.float32) / 255), 8
    return gray(np.asarray(picture.convert("RGB"))), 8


def _turn(values: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the EXIF orientation (1 to 8, TIFF 6.0 tag 274)."""
    if orientation in (5, 6, 7, 8):
        values = values.T
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return np.ascontiguousarray(values)
