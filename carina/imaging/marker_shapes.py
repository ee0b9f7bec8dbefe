"""What lead markers look like, to compare with: letters drawn from strokes, bare, in badges and rings, and decoys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

GRID = 20  # shapes are compared on a grid of this side

# Letters as strokes in a box of 1 x 1: lines of points.
_TURN = np.linspace(-np.pi / 2, np.pi / 2, 13)
_UPPER = [(0.55 + 0.4 * np.cos(t), 0.27 + 0.27 * np.sin(t)) for t in _TURN]
_LOWER = [(0.55 + 0.45 * np.cos(t), 0.74 + 0.26 * np.sin(t)) for t in _TURN]
_WHOLE = [(0.3 + 0.7 * np.cos(t), 0.5 + 0.5 * np.sin(t)) for t in _TURN]
_OPEN = [(0.5 + 0.5 * np.cos(t), 0.5 + 0.5 * np.sin(t)) for t in np.linspace(-0.7, -2 * np.pi + 0.7, 19)]
_STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "L": [[(0, 0), (0, 1), (1, 1)]],
    "R": [[(0, 1), (0, 0), *_UPPER, (0, 0.54)], [(0.5, 0.54), (1, 1)]],
    "A": [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.65), (0.8, 0.65)]],
    "B": [[(0, 1), (0, 0), *_UPPER, (0, 0.51)], [*_LOWER, (0, 1)]],
    "C": [_OPEN],
    "D": [[(0, 1), (0, 0), *_WHOLE, (0, 1)]],
    "E": [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.85, 0.5)]],
    "F": [[(1, 0), (0, 0), (0, 1)], [(0, 0.5), (0.85, 0.5)]],
    "G": [[*_OPEN, (1, 0.55), (0.6, 0.55)]],
    "H": [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
    "K": [[(0, 0), (0, 1)], [(1, 0), (0, 0.6)], [(0.35, 0.4), (1, 1)]],
    "M": [[(0, 1), (0, 0), (0.5, 0.7), (1, 0), (1, 1)]],
    "N": [[(0, 1), (0, 0), (1, 1), (1, 0)]],
    "P": [[(0, 1), (0, 0), *_UPPER, (0, 0.54)]],
    "T": [[(0, 0), (1, 0)], [(0.5, 0), (0.5, 1)]],
    "arrow": [[(0.5, 0), (1, 0.38), (0.67, 0.38), (0.67, 1), (0.33, 1), (0.33, 0.38), (0, 0.38), (0.5, 0)]],
}
_WIDTH = {"L": 0.62, "R": 0.68, "M": 0.9, "E": 0.6, "F": 0.6, "arrow": 0.65}  # over the height
_SERIFS = {"L": [(0.0, 0.0), (0.0, 1.0)], "R": [(0.0, 1.0), (1.0, 1.0)]}
# Width of the strokes over the height, and whether with serifs. An arrow is an outline that is filled.
_FACES = {"L": ((0.13, False), (0.22, False), (0.15, True)), "arrow": ((0.02, False),)}
_FACES["R"] = _FACES["L"]
_PLATES = ("badge round", "badge square", "ring round", "ring square", "ring wide")
_TONGUES = (96, 118, 140)  # lengths of a plate that reaches in from the border, as much as is seen of it
_CANVAS = 160


def _letter(letter: str, weight: float, serif: bool, high: int = 72) -> np.ndarray:
    """(160, 160) float32: a letter `high` px high in the middle, `weight` the width of its strokes over its height."""
    canvas = np.zeros((_CANVAS, _CANVAS), np.uint8)
    box = np.array([high * (_WIDTH.get(letter, 0.75) - weight), high * (1 - weight)])
    thick = max(1, round(high * weight))

    def at(points: list[tuple[float, float]]) -> np.ndarray:
        return np.rint(np.array(points) * box + (_CANVAS - box) / 2).astype(np.int32)

    for line in _STROKES[letter]:
        cv2.polylines(canvas, [at(line)[:, None]], False, 255, thick, cv2.LINE_AA)
        if letter == "arrow":
            cv2.fillPoly(canvas, [at(line)[:, None]], 255, cv2.LINE_AA)
    if serif:
        reach = np.array([round(0.9 * thick), 0])
        for point in at(_SERIFS[letter]):
            cv2.line(canvas, (point - reach).tolist(), (point + reach).tolist(), 255, max(1, thick // 2), cv2.LINE_AA)
    return canvas.astype(np.float32) / 255


def _plate(canvas: np.ndarray, kind: str) -> np.ndarray:
    """The letter cut out of a round or square badge, or inside a round or square ring."""
    plate, middle = np.zeros_like(canvas), _CANVAS // 2
    filled = kind.startswith("badge")
    thick = -1 if filled else 6
    if kind.endswith("square"):
        cv2.rectangle(plate, (middle - 50, middle - 50), (middle + 50, middle + 50), 1.0, thick)
    else:
        cv2.circle(plate, (middle, middle), 57, 1.0, thick)
    return plate - canvas * plate if filled else np.maximum(plate, canvas)


def _tongue(canvas: np.ndarray, length: int) -> np.ndarray:
    """The letter cut out near the round end of a plate 60 px wide."""
    plate, middle = np.zeros_like(canvas), _CANVAS // 2
    top, bottom = middle - length // 2, middle + length // 2
    cv2.rectangle(plate, (middle - 30, top), (middle + 30, bottom - 30), 1.0, -1)
    cv2.circle(plate, (middle, bottom - 30), 30, 1.0, -1)
    return plate - np.roll(canvas, bottom - 42 - middle, axis=0) * plate


def _decoys() -> list[np.ndarray]:
    """What is bright and compact and no letter: buttons, snaps, electrodes, rods, corners and edges of anatomy."""
    y, x = np.mgrid[:_CANVAS, :_CANVAS].astype(np.float32) / (_CANVAS / 2) - 1
    radius = np.hypot(x, y)
    disc = (radius < 0.95).astype(np.float32)
    shapes = [disc, np.sqrt(np.clip(1 - radius**2, 0, 1)), np.ones_like(x), 1 - radius / 2]
    shapes += [disc - 0.6 * (radius < r) for r in (0.3, 0.5, 0.75)]
    shapes += [0.5 * disc + 0.5 * (radius < r) for r in (0.3, 0.5, 0.75)]
    for angle in np.arange(0, np.pi, np.pi / 8):
        along = x * np.cos(angle) + y * np.sin(angle)
        shapes += [along, -along, (np.abs(along) < 0.3).astype(np.float32), np.exp(-((along / 0.6) ** 2))]
        shapes += [(along > 0).astype(np.float32), (along < 0).astype(np.float32)]
    return shapes


def _on_grid(drawing: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(cv2.resize(drawing, (GRID, GRID), interpolation=cv2.INTER_AREA), (0, 0), 0.8).ravel()


def unit(patches: np.ndarray) -> np.ndarray:
    """(N, D): each row with mean 0 and length 1, so that a product is a correlation."""
    patches = patches - patches.mean(axis=1, keepdims=True)
    return patches / (np.sqrt((patches**2).sum(axis=1, keepdims=True)) + 1e-6)


@dataclass(frozen=True)
class Bank:
    """Shapes as rows of GRID x GRID values, each of mean 0 and length 1.

    patches: (N, D) letters, turned by up to 24 degrees, mirrored or not. labels: (N,) "L", "R" or "text". aspects: (N,)
    logarithm of width over height before they were brought to the grid. plated: (N,) bool, in a badge, a ring or on
    a plate. encloses: (N,) bool, those of them in which the letter might be found alone.
    decoys: (K, D) what is bright and compact and no letter.
    """

    patches: np.ndarray
    labels: np.ndarray
    aspects: np.ndarray
    plated: np.ndarray
    encloses: np.ndarray
    decoys: np.ndarray


@lru_cache(maxsize=1)
def bank() -> Bank:
    """All shapes, drawn once."""
    patches, labels, aspects, plated, encloses = [], [], [], [], []

    def add(drawing: np.ndarray, label: str, plate: bool, around: bool = False) -> None:
        for mirrored in (False, True):
            for angle in range(-24, 25, 8):
                matrix = cv2.getRotationMatrix2D((_CANVAS / 2, _CANVAS / 2), angle, 1.0)
                turned = cv2.warpAffine(drawing[:, ::-1] if mirrored else drawing, matrix, drawing.shape[::-1])
                rows, columns = np.flatnonzero(turned.max(1) > 0.3), np.flatnonzero(turned.max(0) > 0.3)
                inner = turned[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                patches.append(_on_grid(inner))
                aspects.append(np.log(inner.shape[1] / inner.shape[0]))
                labels.append(label)
                plated.append(plate)
                encloses.append(around)

    for letter in _STROKES:
        side = letter in _SERIFS
        for weight, serif in _FACES.get(letter, ((0.13, False), (0.22, False))):
            add(_letter(letter, weight, serif), letter if side else "text", False)
            for length in _TONGUES if side else ():
                add(_tongue(_letter(letter, weight, serif, 50), length), letter, True, False)
            for kind in _PLATES if side else ():
                small = _letter(letter, weight, serif, 50 if kind.endswith("wide") else 72)
                add(_plate(small, kind), letter, True, True)
    decoys = unit(np.stack([_on_grid(shape) for shape in _decoys()]))
    return Bank(
        unit(np.stack(patches)).astype(np.float32),
        np.array(labels),
        np.array(aspects, np.float32),
        np.array(plated),
        np.array(encloses),
        decoys.astype(np.float32),
    )
