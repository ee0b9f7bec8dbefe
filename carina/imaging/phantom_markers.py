"""Side markers of synthetic radiographs: lead letters in the beam, or words printed into the picture."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from carina.imaging.phantom_canvas import generator


def markers_of(
    key: tuple, size: int, view: str, borders: np.ndarray, wanted: bool | None
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, float, float, float, float]]]:
    """Side marker and printed words of an image.

    borders: pixels that the shutter takes at left, top, right, bottom. wanted: None draws. Returns the attenuation of
    lead (S, S) in multiples of a full letter, the brightness of print (S, S), and (text, x0, y0, x1, y1) of each.
    """
    rng = generator(*key, "marker")
    u = rng.random(14).tolist()
    lead, printed = np.zeros((size, size), np.float32), np.zeros((size, size), np.float32)
    boxes: list[tuple[str, float, float, float, float]] = []
    if not (u[0] < 0.7 if wanted is None else wanted):
        return lead, printed, boxes
    left = u[1] < 0.6
    text = "L" if left or view == "LATERAL" else "R"
    near = u[2] if view != "LATERAL" else 0.5 * u[2]
    edge = borders / size
    x = edge[0] + 0.045 + 0.05 * near
    if text == "L":
        x = 1 - edge[2] - 0.045 - 0.05 * near
    y = edge[1] + 0.05 + (0.14 * u[3])
    digital = u[4] < 0.25
    tilt = 0.0 if digital else 40 * (u[5] - 0.5) if u[5] > 0.3 else 6 * (u[6] - 0.5)
    font = cv2.FONT_HERSHEY_SIMPLEX if u[7] < 0.6 else cv2.FONT_HERSHEY_DUPLEX
    height = 0.03 + 0.022 * u[8]
    marks = [(text, x, y, height, tilt)]
    if u[9] < 0.3 and view == "AP":
        marks.append(("PORTABLE" if u[10] < 0.5 else "AP", 0.5 + 0.2 * (u[11] - 0.5), edge[1] + 0.035, 0.022, 0.0))
    for number, (word, cx, cy, high, angle) in enumerate(marks):
        shape = _letters(word, font, size, cx, cy, high, angle)
        if not (shape > 0.3).any():
            continue
        rows, columns = np.flatnonzero((shape > 0.02).any(1)), np.flatnonzero((shape > 0.02).any(0))
        box = (columns[0] / size, rows[0] / size, (columns[-1] + 1) / size, (rows[-1] + 1) / size)
        boxes.append((word, *map(float, box)))
        if digital or number:
            printed = np.maximum(printed, shape)
        else:
            lead += shape
    return lead, printed, boxes


@lru_cache(maxsize=16)
def _word(word: str, font: int) -> tuple[np.ndarray, int, int]:
    """A word in large letters with a border of 16 px, float32 in [0, 1], and its width and height in pixels."""
    scale, stroke, pad = 3.0, 9, 16
    (wide, tall), _ = cv2.getTextSize(word, font, scale, stroke)
    patch = np.zeros((tall + 2 * pad, wide + 2 * pad), np.uint8)
    cv2.putText(patch, word, (pad, pad + tall), font, scale, 255, stroke, cv2.LINE_AA)
    return patch.astype(np.float32) / 255, wide, tall


def _letters(word: str, font: int, size: int, cx: float, cy: float, high: float, angle: float) -> np.ndarray:
    """(S, S) float32: a word of `high` (fraction of the frame) around (cx, cy), turned by `angle` degrees."""
    sharp, wide, tall = _word(word, font)
    factor = high * size / tall
    patch = cv2.GaussianBlur(sharp, (0, 0), max(0.35 / factor, 0.3))
    # The whole word stays in the frame.
    reach = 0.5 * np.hypot(wide, tall) * factor / size + 0.006
    cx, cy = (float(np.clip(c, reach, 1 - reach)) if reach < 0.5 else 0.5 for c in (cx, cy))
    matrix = cv2.getRotationMatrix2D((patch.shape[1] / 2, patch.shape[0] / 2), angle, factor)
    matrix[:, 2] += (cx * size - patch.shape[1] / 2, cy * size - patch.shape[0] / 2)
    shape = cv2.warpAffine(patch, matrix, (size, size), flags=cv2.INTER_LINEAR)
    shape[shape < 0.02] = 0
    return shape
