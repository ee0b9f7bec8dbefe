"""The stages that a DICOM header may prescribe: modality LUT or rescale, then VOI LUT or window (PS3.3 C.11.1, C.11.2).

They act on arrays of any shape; `photometry` hands them every value that a stored word can take, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from carina.imaging.header import Unreadable, number, numbers, stored_range, text

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


@dataclass(frozen=True)
class Table:
    """A LUT of PS3.3 C.11.1.1 or C.11.2.1.1: values below `first` take entry 0, values beyond the end the last."""

    first: int
    entries: np.ndarray
    bits: int

    @classmethod
    def read(cls, item: Dataset, lowest: float, little_endian: bool) -> Table:
        """lowest: the least value that can come in; it tells whether the descriptor's numbers are signed."""
        try:
            length, first, bits = (int(value) for value in item.LUTDescriptor)
            data = item.LUTData
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Unreadable("the look-up table in the header is incomplete") from None
        # The three numbers share one VR, US or SS, by the sign of the pixels: the length is a count all the same, and
        # the first value has the sign of what comes in.
        length = length % 2**16 or 2**16
        first = (first + 2**15) % 2**16 - 2**15 if lowest < 0 else first % 2**16
        if isinstance(data, bytes):
            wide = len(data) >= 2 * length
            entries = np.frombuffer(data, ("<u2" if little_endian else ">u2") if wide else "u1")[:length]
        else:
            entries = np.atleast_1d(np.asarray(data, dtype=np.int64))[:length] % 2**16
        if len(entries) < length or not 8 <= bits <= 16:
            raise Unreadable("the look-up table in the header is incomplete")
        return cls(first, entries.astype(np.float64), bits)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """float64 of the shape of `values`, which may be fractional; a fraction belongs to the value below it."""
        last = len(self.entries) - 1
        index = np.clip(np.floor(values) - self.first, 0, last).astype(np.int32)
        return self.entries[index]

    @property
    def top(self) -> float:
        return float(2**self.bits - 1)


def modality(values: np.ndarray, header: Dataset, bits: int, little: bool) -> tuple[np.ndarray, tuple[float, float]]:
    """Modality LUT or rescale of stored `values` (float64). Returns the new values and their full range, ascending."""
    low, high = stored_range(bits, bool(header.get("PixelRepresentation")))
    if header.get("ModalityLUTSequence"):
        table = Table.read(header.ModalityLUTSequence[0], low, little)
        return table(values), (0.0, table.top)
    slope, intercept = number(header, "RescaleSlope", 1.0), number(header, "RescaleIntercept", 0.0)
    if slope == 0:
        raise Unreadable("the rescale slope in the header is 0")
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return values * slope + intercept, (ends[0], ends[1])


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` -> 0 and `high` -> 1, clipped, as float32 (float64 from float64 and 32-bit integers).

    A range without width is a step just above `low`.
    """
    kind = np.result_type(values, np.float32)
    if high <= low:
        return (values > low).astype(kind)
    image = values.astype(kind)  # always a copy: it is changed in place
    image -= kind.type(low)
    image *= kind.type(1.0 / (high - low))
    return np.clip(image, 0.0, 1.0, out=image)


def window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """A window of PS3.3 C.11.2.1.2 and C.11.2.1.3: floats in [0, 1], of the kind that `stretch` gives.

    function: LINEAR (half-pixel terms; width >= 1), LINEAR_EXACT or SIGMOID (width > 0). Raises ValueError else.
    """
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or (width < 1 and (function == "LINEAR" or width <= 0)):
        raise ValueError("no such window")
    if function == "SIGMOID":
        exponent = (values.astype(np.result_type(values, np.float32)) - center) * (-4.0 / width)
        return 1.0 / (1.0 + np.exp(np.clip(exponent, -80.0, 80.0)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1.0
    return stretch(values, center - width / 2, center + width / 2)


def voi(values: np.ndarray, header: Dataset, full: tuple[float, float], little: bool) -> tuple[np.ndarray, str] | None:
    """The header's first VOI LUT, else its first valid window, as [0, 1] with words that say so; None without either.

    full: the range that `values` can have.
    """
    tables = header.get("VOILUTSequence")
    if tables:
        table = Table.read(tables[0], full[0], little)
        return stretch(table(values), 0.0, table.top), "header VOI LUT" + _of(len(tables))
    function = text(header, "VOILUTFunction").upper() or "LINEAR"
    pairs = list(zip(numbers(header, "WindowCenter"), numbers(header, "WindowWidth")))
    for center, width in pairs:
        try:
            shown = window(values, center, width, function)
        except ValueError:
            continue
        return shown, f"header window {center:g}/{width:g} {function}" + _of(len(pairs))
    return None


def _of(count: int) -> str:
    return f" (of {count})" if count > 1 else ""
