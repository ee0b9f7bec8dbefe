"""Bright or dark bone: the one inversion of a radiograph, decided by the header and checked on the pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from carina.imaging.header import text

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_MARGIN = 0.1  # of the polarity score; inverted pictures have the same score with the other sign


def polarity_step(shape: tuple[int, ...]) -> int:
    """Every so many rows and columns are enough for `polarity_score`."""
    return max(1, min(shape) // 256)


def polarity_score(image: np.ndarray) -> float:
    """How much the picture looks like a radiograph with bright = dense: above 0.1 yes, below -0.1 inverted.

    The middle of a chest (spine, heart) is denser than what lies beside it and than the upper corners (air). Both
    contrasts are taken on a 64 x 64 picture in its own range and added; an inverted picture has the negative score.
    """
    step = polarity_step(image.shape)
    small = np.ascontiguousarray(image[::step, ::step], dtype=np.float32)
    small = cv2.resize(small, (64, 64), interpolation=cv2.INTER_AREA)
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


def inverts(image: np.ndarray, photometric: str, shape: str = "", chest: bool = True) -> tuple[bool, str]:
    """Whether `image` is to be inverted, and what is to be thought of it: ``ok``, ``suspicious`` or ``contradictory``.

    image: (H, W), or every `polarity_step`-th row and column of it. shape (PresentationLUTShape) decides when present,
    else `photometric`. The standard pairs MONOCHROME1 with INVERSE and MONOCHROME2 with IDENTITY (PS3.3 C.8.11.3.1.2);
    on another pair the pixels decide when they are clear, else the shape. Pixels that clearly speak against an agreeing
    header are only flagged. With ``chest=False`` the pixels are not asked.
    """
    by_photometric = photometric == "MONOCHROME1"
    by_shape = {"INVERSE": True, "IDENTITY": False}.get(shape, by_photometric)
    score = polarity_score(image) if chest else 0.0
    if by_shape != by_photometric:
        return (score < 0 if abs(score) > _MARGIN else by_shape), "contradictory"
    return by_shape, "suspicious" if (-score if by_shape else score) < -_MARGIN else "ok"
