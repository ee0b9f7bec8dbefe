"""From stored values to one picture: float32, [0, 1], bright = dense.

The order is the one of DICOM PS3.3 (C.7.6.3, C.11.1, C.11.2): modality LUT or rescale, VOI LUT or window, scaling to
[0, 1], and at most one inversion, last. Inverting earlier, or twice, is the commonest fault of radiograph readers.
All of it is worked out for the values that a stored word can have, and the picture is then looked up in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_type_hints

import cv2
import numpy as np

from carina.errors import CarinaError, nearest
from carina.imaging.header import Unreadable, number, stored_range, text
from carina.imaging.polarity import inverts, maybe_chest, polarity_score, polarity_step
from carina.imaging.ranges import ROBUST, collimated, padding_of, reaches_frame, robust_range, sample_step
from carina.imaging.voi import modality, stretch, voi, window

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["Choices", "Photometry", "Unreadable", "collimated", "develop", "polarity_score", "window"]

_VISIBLE = 0.02  # a window that leaves less contrast than this shows nothing
# CLAHE with 8 x 8 tiles, no gray level of a tile counting for more than twice its even share.
_TILES, _CLIP = 8, 2.0
_WIDE_TABLES = int(cv2.__version__.split(".")[0]) >= 5  # cv2.LUT takes 16-bit words


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
    """How stored values become gray.

    window: ``auto`` takes the header's VOI LUT or window when there is one that shows something, else ``percentile``
    for data of more than 8 bits and ``full`` for 8; ``header`` takes the VOI LUT or window, else the full stored range,
    as the standard does; ``percentile`` is the robust range (0.5 % to 99.5 %) of the pixels inside the collimated
    area; ``full`` is the stored range.
    for_processing: raw detector data is refused, or its logarithm is taken.
    frames: a file with several frames is refused, or its first frame is taken.
    equalize: ``clahe`` is contrast-limited adaptive histogram equalization (Pizer et al. 1987, Zuiderveld 1994) of the
    finished picture in 256 gray levels, with 8 x 8 tiles and a clip limit of 2.
    markers: side markers outside the lungs stay, are inpainted, or are clipped to the range of the rest (Kim et al.
    2022); done on the frame, by `carina.imaging.frames`.
    """

    window: Literal["auto", "header", "percentile", "full"] = "auto"
    for_processing: Literal["reject", "log"] = "reject"
    frames: Literal["reject", "first"] = "reject"
    equalize: Literal["none", "clahe"] = "none"
    markers: Literal["keep", "inpaint", "clip"] = "keep"


def equalized(image: np.ndarray, choice: str) -> np.ndarray:
    """`image` (float32, [0, 1]) as it is, or after CLAHE."""
    if choice == "none":
        return image
    levels = np.round(image * np.float32(255)).astype(np.uint8)
    levels = cv2.createCLAHE(clipLimit=_CLIP, tileGridSize=(_TILES, _TILES)).apply(levels)
    return levels.astype(np.float32) / np.float32(255)


class _Words:
    """The stored words of a picture. `values`: float64, every value from the least of them to the greatest, ascending;
    of words with more than 16 bits, the pixels themselves.
    """

    def __init__(self, stored: np.ndarray):
        self.stored, self.wide = stored, stored.dtype.itemsize > 2
        if self.wide:
            self.values = stored.astype(np.float64)
        else:
            self.low, high = int(stored.min()), int(stored.max())
            self.values = np.arange(self.low, high + 1, dtype=np.float64)

    def sample(self, tones: np.ndarray, step: int) -> np.ndarray:
        """What `tones`, one for each of `values`, are at every step-th row and column of the picture."""
        if self.wide:
            return tones[::step, ::step]
        return tones[self.stored[::step, ::step].astype(np.int32) - self.low]

    def image(self, tones: np.ndarray) -> np.ndarray:
        """(H, W) float32: the picture in `tones`."""
        if self.wide:
            return tones.astype(np.float32)
        pattern = np.dtype(f"u{self.stored.dtype.itemsize}")
        table = np.zeros(2 ** (8 * pattern.itemsize), dtype=np.float32)
        table[np.arange(self.low, self.low + len(tones)) % len(table)] = tones  # negative values are patterns beyond
        words = self.stored.view(pattern)
        if _WIDE_TABLES or pattern.itemsize == 1:
            return cv2.LUT(words, table)
        image = np.empty(words.shape, dtype=np.float32)
        for top in range(0, len(image), 64):  # the indices that numpy makes of the words stay in the cache
            np.take(table, words[top : top + 64], out=image[top : top + 64], mode="clip")
        return image


def by_range(
    values: np.ndarray,
    choice: str,
    full: tuple[float, float],
    bits: int,
    robust: Callable[[np.ndarray], tuple[float, float]] = robust_range,
) -> tuple[np.ndarray, str]:
    """Values without a header's window as [0, 1]: the ``full`` range, or the robust one. Returns image and words."""
    if choice in ("full", "header") or (choice == "auto" and bits <= 8):
        return stretch(values, *full), "full range"
    return stretch(values, *robust(values)), f"percentile {ROBUST[0]:g}-{ROBUST[1]:g}"


def is_raw(header: Dataset) -> bool:
    """Whether the header says raw detector data.

    FOR PROCESSING is; so is what is linear in the intensity of the X-rays (PixelIntensityRelationship LIN) and does not
    say that it is for presentation. With FOR PRESENTATION the relationship only describes the detector; the VOI stage
    alone prescribes what is seen (PS3.3 C.8.11.3.1.2), and exports of clinical archives carry that pair.
    """
    intent = text(header, "PresentationIntentType").upper()
    linear = text(header, "PixelIntensityRelationship").upper() == "LIN"
    return intent == "FOR PROCESSING" or (linear and intent != "FOR PRESENTATION")


def _logarithm(values: np.ndarray, header: Dataset, bits: int) -> np.ndarray:
    """Raw detector data on the logarithmic scale, on which thickness is linear (Beer-Lambert); order is kept."""
    if text(header, "PixelIntensityRelationship").upper() == "LOG":
        return values
    low, high = stored_range(bits, bool(header.get("PixelRepresentation")))
    values = np.clip(values, low, high)
    if number(header, "PixelIntensityRelationshipSign", 1.0) < 0:
        return -np.log1p(high - values)
    return np.log1p(values - low)


def develop(
    stored: np.ndarray, header: Dataset, photometry: Photometry, bits: int, little_endian: bool = True
) -> tuple[np.ndarray, str, str]:
    """Stored values of one MONOCHROME frame -> (image (H, W) float32 in [0, 1], window in words, polarity).

    stored: (H, W) integers as decoded. header: the data set. bits: bits stored. Padding becomes 0 (air). Raises
    Unreadable for raw detector data (unless for_processing=log) and for damaged tables.
    """
    photometric, shape = (text(header, key).upper() for key in ("PhotometricInterpretation", "PresentationLUTShape"))
    padding = padding_of(stored, header)
    words = _Words(np.ascontiguousarray(stored))

    step = sample_step(stored.shape)

    def robust(values: np.ndarray) -> tuple[float, float]:
        return robust_range(words.sample(values, step), None if padding is None else padding[::step, ::step])

    if is_raw(header):
        if photometry.for_processing == "reject":
            raise Unreadable("raw detector data (FOR PROCESSING or linear in intensity); for_processing=log takes it")
        values = _logarithm(words.values, header, bits)
        tones, said = stretch(values, *robust(values)), "logarithm of raw data, percentile"
        sign = number(header, "PixelIntensityRelationshipSign")
        if sign is not None:
            # The sign says what a high value means: +1 more X-rays, hence less tissue. It is surer than the display.
            photometric, shape = ("MONOCHROME1" if sign > 0 else "MONOCHROME2"), ""
    else:
        values, full = modality(words.values, header, bits, little_endian)
        shown = voi(values, header, full, little_endian) if photometry.window in ("auto", "header") else None
        if shown is not None and photometry.window == "auto" and not _shows(words, shown[0], padding):
            shown = None
        tones, said = shown or by_range(values, photometry.window, full, bits, robust)
    if not np.isfinite(tones).all():
        raise Unreadable("the header's description of gray values leads beyond all numbers")

    look = words.sample(tones, polarity_step(stored.shape))
    invert, polarity = inverts(look, photometric, shape, maybe_chest(header))
    image = equalized(words.image(1.0 - tones if invert else tones), photometry.equalize)
    if padding is not None:
        image[reaches_frame(padding)] = 0.0
    return image, said, polarity


def _shows(words: _Words, tones: np.ndarray, padding: np.ndarray | None) -> bool:
    step = sample_step(words.stored.shape, 2**12)
    sample = words.sample(tones, step)
    if padding is not None:
        sample = sample[~padding[::step, ::step]]
    return sample.size > 0 and float(np.subtract(*np.percentile(sample, (99, 1)))) >= _VISIBLE
