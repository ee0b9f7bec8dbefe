"""From stored values to one picture: float32, [0, 1], bright = dense; then to a square frame.

The order is the one of DICOM PS3.3 (C.7.6.3, C.11.1, C.11.2): modality LUT or rescale, VOI LUT or window, scaling to
[0, 1], and at most one inversion, last. Inverting earlier, or twice, is the commonest fault of radiograph readers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_type_hints

import cv2
import numpy as np

from carina.errors import CarinaError, nearest

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Percentiles of the robust range: symmetric, so that inverting the stored values inverts the picture and no more.
ROBUST = (0.5, 99.5)
_SAMPLE = 250_000  # pixels that a percentile looks at; its error is then far below one grey level of 8 bits
_VISIBLE = 0.02  # a window that leaves less contrast than this shows nothing
_POLARITY = 0.1  # margin of the polarity score; inverted pictures have the same score with the other sign


class Unreadable(Exception):
    """Why ONE file cannot become a picture. The message holds neither the path nor any text of the header."""


class Choices:
    """Frozen settings whose fields are choices; an unknown field or value is a CarinaError."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise CarinaError(
                    f"{name}={value!r} is not a choice of {type(self).__name__.lower()}"
                    f"{nearest(str(value), allowed)}: take one of {', '.join(allowed)}"
                )

    def to_dict(self) -> dict[str, str]:
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in names:
                known = ", ".join(names)
                raise CarinaError(
                    f"'{name}' is not a setting of {cls.__name__.lower()}{nearest(name, names)}: it has {known}"
                )
        return cls(**values)


@dataclass(frozen=True)
class Photometry(Choices):
    """How stored values become grey.

    window: ``auto`` takes the header's VOI LUT or window when there is one that shows something, else ``percentile``
    for data of more than 8 bits and ``full`` for 8; ``header`` takes the VOI LUT or window, else the full stored range,
    as the standard does; ``percentile`` is the robust range (0.5 % to 99.5 %) of the pixels inside the collimated
    area; ``full`` is the stored range.
    for_processing: raw detector data is refused, or its logarithm is taken.
    frames: a file with several frames is refused, or its first frame is taken.
    """

    window: Literal["auto", "header", "percentile", "full"] = "auto"
    for_processing: Literal["reject", "log"] = "reject"
    frames: Literal["reject", "first"] = "reject"


@dataclass(frozen=True)
class Geometry(Choices):
    """How a rectangle becomes a square: ``pad`` keeps all and the aspect, ``crop`` the aspect, ``stretch`` all."""

    fit: Literal["pad", "stretch", "crop"] = "pad"


# --- stored values -> [0, 1] --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """A LUT of PS3.3 C.11.1.1 / C.11.2.1.1: values below `first` take entry 0, values beyond the end the last."""

    first: int
    entries: np.ndarray
    bits: int

    @classmethod
    def read(cls, item: Dataset, little_endian: bool) -> _Table:
        try:
            length, first, bits = (int(value) for value in item.LUTDescriptor)
            data = item.LUTData
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Unreadable("the look-up table in the header is incomplete") from None
        length = length or 2**16
        if isinstance(data, bytes):
            wide = len(data) >= 2 * length
            entries = np.frombuffer(data, ("<u2" if little_endian else ">u2") if wide else "u1")[:length]
        else:
            entries = np.atleast_1d(np.asarray(data, dtype=np.int64))[:length]
        if len(entries) < length or not 8 <= bits <= 16:
            raise Unreadable("the look-up table in the header is incomplete")
        return cls(first, entries.astype(np.float32), bits)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        index = values.astype(np.int32)
        index -= np.int32(self.first)
        return np.take(self.entries, index, mode="clip")

    @property
    def top(self) -> float:
        return float(2**self.bits - 1)


def _number(header: Dataset, keyword: str, default: float | None = None) -> float | None:
    """The first value of a numeric element, or `default` when it is absent, empty or not a finite number."""
    value = header.get(keyword)
    if value is None or isinstance(value, str) or (hasattr(value, "__len__") and len(value) == 0):
        return default
    try:
        number = float(value[0] if hasattr(value, "__len__") else value)
    except (TypeError, ValueError):
        return default
    return number if np.isfinite(number) else default


def text(header: Dataset, keyword: str) -> str:
    """An element as stripped text, its first value when it has several, empty when absent."""
    value = header.get(keyword)
    if value is not None and not isinstance(value, str) and hasattr(value, "__iter__"):
        value = next(iter(value), "")
    return " ".join(str(value).split()) if value is not None else ""


def stored_range(bits: int, signed: bool) -> tuple[int, int]:
    """Least and greatest value that `bits` stored bits can hold."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _modality(stored: np.ndarray, header: Dataset, bits: int, little: bool) -> tuple[np.ndarray, tuple[float, float]]:
    """Modality LUT or rescale. Returns the values and their full range, ascending."""
    if header.get("ModalityLUTSequence"):
        table = _Table.read(header.ModalityLUTSequence[0], little)
        return table(stored), (0.0, table.top)
    low, high = stored_range(bits, bool(header.get("PixelRepresentation")))
    slope, intercept = _number(header, "RescaleSlope", 1.0), _number(header, "RescaleIntercept", 0.0)
    if slope == 0:
        raise Unreadable("the rescale slope in the header is 0")
    if (slope, intercept) == (1.0, 0.0):
        return stored, (float(low), float(high))
    values = stored.astype(np.float32)
    values *= np.float32(slope)
    values += np.float32(intercept)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return values, (ends[0], ends[1])


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """float32 with `low` -> 0 and `high` -> 1, clipped. A range without width is a step just above `low`."""
    if high <= low:
        return (values > low).astype(np.float32)
    image = values.astype(np.float32)  # always a copy: it is changed in place
    image -= np.float32(low)
    image *= np.float32(1.0 / (high - low))
    return np.clip(image, 0.0, 1.0, out=image)


def window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """A window of PS3.3 C.11.2.1.2 and C.11.2.1.3 as float32 in [0, 1].

    function: LINEAR (half-pixel terms; width >= 1), LINEAR_EXACT or SIGMOID (width > 0). Raises ValueError else.
    """
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or (width < 1 and (function == "LINEAR" or width <= 0)):
        raise ValueError("no such window")
    if function == "SIGMOID":
        exponent = values.astype(np.float32)
        exponent -= np.float32(center)
        exponent *= np.float32(-4.0 / width)
        np.exp(np.minimum(exponent, 80.0, out=exponent), out=exponent)
        exponent += 1.0
        return np.reciprocal(exponent, out=exponent)
    if function == "LINEAR":
        center, width = center - 0.5, width - 1.0
    return stretch(values, center - width / 2, center + width / 2)


def _voi(values: np.ndarray, header: Dataset, little: bool) -> tuple[np.ndarray, str] | None:
    """The header's VOI LUT, else its first valid window, as [0, 1] with the words that say so; None without either."""
    if header.get("VOILUTSequence"):
        table = _Table.read(header.VOILUTSequence[0], little)
        table = replace(table, entries=stretch(table.entries, 0.0, table.top))
        return table(values), "header VOI LUT"
    center, width = _number(header, "WindowCenter"), _number(header, "WindowWidth")
    if center is None or width is None:
        return None
    function = text(header, "VOILUTFunction").upper() or "LINEAR"
    try:
        return window(values, center, width, function), f"header window {center:g}/{width:g} {function}"
    except ValueError:
        return None


def collimated(values: np.ndarray, padding: np.ndarray | None = None) -> tuple[slice, slice]:
    """Rows and columns that are left when flat margins (collimator, border of a scan) are trimmed.

    A margin is a run of edge rows or columns whose own spread (5 % to 95 %) is below 2 % of the whole picture's. Never
    trims to less than half of a side, since a picture that flat has no collimator but is empty.
    """
    step = max(1, max(values.shape) // 256)
    small = values[::step, ::step].astype(np.float32)
    if padding is not None:
        # A sentinel far outside the range would make everything else look flat.
        blank = padding[::step, ::step]
        small[blank] = np.median(small[~blank]) if not blank.all() else 0.0
    low, high = np.percentile(small, ROBUST)
    keep = []
    for axis in (0, 1):
        ends = np.percentile(small, (5, 95), axis=1 - axis)
        busy = np.flatnonzero(ends[1] - ends[0] > 0.02 * (high - low))
        side = values.shape[axis]
        start, stop = (int(busy[0]) * step, min(side, (int(busy[-1]) + 1) * step)) if len(busy) else (0, side)
        keep.append(slice(start, stop) if stop - start >= side / 2 else slice(0, side))
    return keep[0], keep[1]


def robust_range(values: np.ndarray, padding: np.ndarray | None = None) -> tuple[float, float]:
    """(low, high): the robust range of the pixels inside the collimated area; `padding` (H, W) bool is left out."""
    area = collimated(values, padding)
    inside = values[area]
    step = max(1, int(np.sqrt(inside.size / _SAMPLE)))
    sample = inside[::step, ::step].ravel()
    if padding is not None:
        sample = sample[~padding[area][::step, ::step].ravel()]
        if sample.size == 0:
            sample = values[~padding]
    if sample.size == 0:
        raise Unreadable("every pixel is padding")
    low, high = np.percentile(sample, ROBUST)
    if low == high:
        low, high = sample.min(), sample.max()
    return float(low), float(high)


def by_range(
    values: np.ndarray, choice: str, full: tuple[float, float], bits: int, padding: np.ndarray | None = None
) -> tuple[np.ndarray, str]:
    """Values without a header's window as [0, 1]: the ``full`` range, or the robust one. Returns image and words."""
    if choice in ("full", "header") or (choice == "auto" and bits <= 8):
        return stretch(values, *full), "full range"
    return stretch(values, *robust_range(values, padding)), f"percentile {ROBUST[0]:g}-{ROBUST[1]:g}"


def padding_of(stored: np.ndarray, header: Dataset) -> np.ndarray | None:
    """(H, W) bool where the stored value is PixelPaddingValue (or within PixelPaddingRangeLimit); None without any."""
    first = _number(header, "PixelPaddingValue")
    if first is None:
        return None
    last = _number(header, "PixelPaddingRangeLimit", first)
    if stored.dtype.kind == "i" and min(first, last) > np.iinfo(stored.dtype).max:
        # Writers give the value of signed data as unsigned (the element is "US or SS").
        first, last = (value - 2.0 ** (8 * stored.dtype.itemsize) for value in (first, last))
    mask = (stored >= min(first, last)) & (stored <= max(first, last))
    return mask if mask.any() else None


def _reaches_frame(mask: np.ndarray) -> np.ndarray:
    """The components of `mask` that touch the frame: padding fills up to the edge, an equal value inside is tissue."""
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, edge[edge > 0])


def is_raw(header: Dataset) -> bool:
    """Whether the header says raw detector data: FOR PROCESSING, or linear in the intensity of the X-rays."""
    return (
        text(header, "PresentationIntentType").upper() == "FOR PROCESSING"
        or text(header, "PixelIntensityRelationship").upper() == "LIN"
    )


def _logarithm(stored: np.ndarray, header: Dataset, bits: int) -> np.ndarray:
    """Raw detector data on the logarithmic scale, on which thickness is linear (Beer-Lambert); order is kept."""
    if text(header, "PixelIntensityRelationship").upper() == "LOG":
        return stored
    low, high = stored_range(bits, bool(header.get("PixelRepresentation")))
    if _number(header, "PixelIntensityRelationshipSign", 1.0) < 0:
        return -np.log1p(np.float32(high) - stored.astype(np.float32))
    return np.log1p(stored.astype(np.float32) - np.float32(low))


def polarity_score(image: np.ndarray) -> float:
    """How much the picture looks like a radiograph with bright = dense: above 0.1 yes, below -0.1 inverted.

    The middle of a chest (spine, heart) is denser than what lies beside it and than the upper corners (air). Both
    contrasts are taken on a 64 x 64 picture in its own range and added; an inverted picture has the negative score.
    """
    step = max(1, min(image.shape) // 256)
    small = cv2.resize(np.ascontiguousarray(image[::step, ::step]), (64, 64), interpolation=cv2.INTER_AREA)
    low, high = np.percentile(small, (2, 98))
    if high <= low:
        return 0.0
    middle = small[20:48, 28:36].mean()
    beside = (small[20:44, 12:24].mean() + small[20:44, 40:52].mean()) / 2
    corners = (small[:8, :8].mean() + small[:8, -8:].mean()) / 2
    return float((2 * middle - beside - corners) / (high - low))


def maybe_chest(header: Dataset) -> bool:
    """Whether the header lets this be a radiograph of a chest, on which alone the polarity of pixels can be judged."""
    part = text(header, "BodyPartExamined").upper()
    return text(header, "Modality").upper() in ("", "CR", "DX", "DR", "RG", "RF", "OT", "SC") and (
        not part or any(word in part for word in ("CHEST", "THORAX", "LUNG", "RIB"))
    )


def orient(image: np.ndarray, photometric: str, shape: str = "", chest: bool = True) -> tuple[np.ndarray, str]:
    """The one inversion, and what is to be thought of it: ``ok``, ``suspicious`` or ``contradictory``.

    shape (PresentationLUTShape) decides when present, else `photometric`. The standard pairs MONOCHROME1 with INVERSE
    and MONOCHROME2 with IDENTITY; on another pair the pixels decide when they are clear, else the shape. Pixels that
    clearly speak against an agreeing header are only flagged. With ``chest=False`` the pixels are not asked.
    """
    by_photometric = photometric == "MONOCHROME1"
    by_shape = {"INVERSE": True, "IDENTITY": False}.get(shape, by_photometric)
    score = polarity_score(image) if chest else 0.0
    if by_shape != by_photometric:
        invert = score < 0 if abs(score) > _POLARITY else by_shape
        polarity = "contradictory"
    else:
        invert = by_shape
        polarity = "suspicious" if (-score if invert else score) < -_POLARITY else "ok"
    return (np.subtract(1.0, image, out=image) if invert else image), polarity


def develop(
    stored: np.ndarray, header: Dataset, photometry: Photometry, bits: int, little_endian: bool = True
) -> tuple[np.ndarray, str, str]:
    """Stored values of one MONOCHROME frame -> (image (H, W) float32 in [0, 1], window in words, polarity).

    stored: (H, W) integers as decoded. header: the data set. bits: bits stored. Padding becomes 0 (air). Raises
    Unreadable for raw detector data (unless for_processing=log) and for damaged tables.
    """
    photometric, shape = (text(header, key).upper() for key in ("PhotometricInterpretation", "PresentationLUTShape"))
    padding = padding_of(stored, header)
    if is_raw(header):
        if photometry.for_processing == "reject":
            raise Unreadable("raw detector data (FOR PROCESSING or linear in intensity); for_processing=log takes it")
        values = _logarithm(stored, header, bits)
        image, words = stretch(values, *robust_range(values, padding)), "logarithm of raw data, percentile"
        sign = _number(header, "PixelIntensityRelationshipSign")
        if sign is not None:
            # The sign says what a high value means: +1 more X-rays, hence less tissue. It is surer than the display.
            photometric, shape = ("MONOCHROME1" if sign > 0 else "MONOCHROME2"), ""
    else:
        values, full = _modality(stored, header, bits, little_endian)
        shown = _voi(values, header, little_endian) if photometry.window in ("auto", "header") else None
        if shown is not None and photometry.window == "auto" and not _shows(shown[0], padding):
            shown = None
        image, words = shown or by_range(values, photometry.window, full, bits, padding)
    image, polarity = orient(image, photometric, shape, maybe_chest(header))
    if padding is not None:
        image[_reaches_frame(padding)] = 0.0
    return image, words, polarity


def _shows(image: np.ndarray, padding: np.ndarray | None) -> bool:
    step = max(1, int(np.sqrt(image.size / _SAMPLE)))
    sample = image[::step, ::step]
    if padding is not None:
        sample = sample[~padding[::step, ::step]]
    return sample.size > 0 and float(np.subtract(*np.percentile(sample, (99, 1)))) >= _VISIBLE


# --- rectangle -> square ------------------------------------------------------------------------------------------

Affine = tuple[float, float, float, float]


def frame(height: int, width: int, geometry: Geometry, spacing: tuple[float, float] | None = None) -> tuple[int, ...]:
    """The part of the original that the square shows: (left, top, columns, rows) in whole original pixels.

    With ``pad`` it reaches beyond the picture. With anisotropic `spacing` (row_mm, col_mm) its sides are equal in
    millimeters to within half a pixel; that, and the odd pixel of centering, are the only roundings of the geometry.
    """
    row, col = spacing or (1.0, 1.0)
    if geometry.fit == "stretch":
        return 0, 0, width, height
    side = (max if geometry.fit == "pad" else min)(height * row, width * col)
    columns, rows = max(1, round(side / col)), max(1, round(side / row))
    return (width - columns) // 2, (height - rows) // 2, columns, rows


def _resample(image: np.ndarray, axis: int, start: int, length: int, size: int) -> np.ndarray:
    """Cut or zero-pad `axis` to [start, start + length), then bring it to `size`: area when shrinking, else linear."""
    side = image.shape[axis]
    kept = slice(max(start, 0), min(start + length, side))
    image = image[kept, :] if axis == 0 else image[:, kept]
    before, after = max(-start, 0), max(start + length - side, 0)
    if before or after:
        image = np.pad(image, ((before, after), (0, 0)) if axis == 0 else ((0, 0), (before, after)))
    if length == size:
        return image
    shape = (image.shape[1], size) if axis == 0 else (size, image.shape[0])
    method = cv2.INTER_AREA if length > size else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(image), shape, interpolation=method)


def resize(
    image: np.ndarray, size: int, geometry: Geometry, spacing: tuple[float, float] | None = None
) -> tuple[np.ndarray, Affine]:
    """(H, W) float32 in [0, 1] -> ((size, size) float32 in [0, 1], affine (ax, bx, ay, by)).

    The affine takes a point in original pixel-edge coordinates (0 <= x <= W, 0 <= y <= H) to fractions of the stored
    frame: fx = ax * x + bx, fy = ay * y + by. It is exact and the same for every `size`: padding and cutting happen
    in whole original pixels, before the (separable) area filter, never in pixels of the result. spacing: (row_mm,
    col_mm) of the pixels; None is square pixels.
    """
    height, width = image.shape
    left, top, columns, rows = frame(height, width, geometry, spacing)
    # The side with less padding first: then a long picture is never padded to a square of its own length.
    steps = [(0, top, rows), (1, left, columns)]
    for axis, start, length in sorted(steps, key=lambda step: step[2] - (height, width)[step[0]]):
        image = _resample(image, axis, start, length, size)
    affine = (1.0 / columns, -left / columns, 1.0 / rows, -top / rows)
    return np.clip(image, 0.0, 1.0, dtype=np.float32), affine


def resize_mask(
    mask: np.ndarray, size: int, geometry: Geometry, spacing: tuple[float, float] | None = None
) -> np.ndarray:
    """(H, W) bool -> (size, size) bool by the same geometry: a pixel is set when at least half of its area is."""
    return resize(mask.astype(np.float32), size, geometry, spacing)[0] >= 0.5
