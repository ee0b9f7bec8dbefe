"""The drawing board of the synthetic radiographs: smooth polygons, lines, steps and domes on a grid in centimeters."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from carina.draws import hash64

BITS = 4  # fractional bits of the coordinates that OpenCV draws with


def generator(*key: object) -> np.random.Generator:
    """A Philox stream (counter-based) that depends on `key` alone."""
    return np.random.Generator(np.random.Philox(key=hash64("phantom", *key)))


@dataclass
class Grid:
    """Pixels of a frame in cm. ``x`` is (1, S), ``y`` is (S, 1)."""

    size: int
    scale: float  # pixels per cm
    left: float  # x of the frame's left edge
    top: float  # y of the frame's upper edge
    x: np.ndarray = field(init=False)
    y: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        at = (np.arange(self.size, dtype=np.float32) + 0.5) / self.scale
        self.x, self.y = (at + np.float32(self.left))[None, :], (at + np.float32(self.top))[:, None]

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 2) in cm as the fixed-point pixels of OpenCV."""
        moved = (np.asarray(points) - (self.left, self.top)) * self.scale - 0.5
        return np.round(moved * (1 << BITS)).astype(np.int32)

    def fill(self, *polygons: np.ndarray) -> np.ndarray:
        """(S, S) float32, 1 inside any of the polygons (N, 2), with smooth edges."""
        canvas = np.zeros((self.size, self.size), np.uint8)
        for polygon in polygons:
            cv2.fillPoly(canvas, [self.points(polygon)], 255, cv2.LINE_AA, BITS)
        return canvas.astype(np.float32) * np.float32(1 / 255)

    def strokes(self, paths: list[tuple[np.ndarray, float, float]]) -> np.ndarray:
        """(S, S) float32: lines (N, P, 2) with a width in cm and a value in [0, 1]; the larger value wins."""
        canvas = np.zeros((self.size, self.size), np.uint8)
        for lines, width, value in sorted(paths, key=lambda path: path[2] * min(1.0, path[1] * self.scale)):
            pixels = width * self.scale
            # Lines narrower than a pixel are drawn one pixel wide and fainter, so small sizes look like reduced ones.
            shade = round(255 * value * min(1.0, pixels))
            cv2.polylines(canvas, list(self.points(lines)), False, shade, max(1, round(pixels)), cv2.LINE_AA, BITS)
        return canvas.astype(np.float32) * np.float32(1 / 255)

    def blur(self, image: np.ndarray, sigma: float) -> np.ndarray:
        """Gaussian blur with sigma in cm; wide ones are computed on a reduced grid."""
        pixels = sigma * self.scale
        if pixels < 0.25:
            return image
        if pixels > 4:
            factor = int(pixels // 2)
            small = cv2.resize(image, (max(8, self.size // factor),) * 2, interpolation=cv2.INTER_AREA)
            small = cv2.GaussianBlur(
                small, (0, 0), pixels * small.shape[0] / self.size, borderType=cv2.BORDER_REPLICATE
            )
            return cv2.resize(small, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
        return cv2.GaussianBlur(image, (0, 0), pixels, borderType=cv2.BORDER_REPLICATE)


def smooth_line(points: np.ndarray, closed: bool = True, steps: int = 8) -> np.ndarray:
    """A Catmull-Rom curve (M, 2) through `points` (N, 2)."""
    p = np.asarray(points, np.float64)
    if closed:
        before, after, after2 = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    else:
        padded = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
        before, p, after, after2 = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = (np.arange(steps) / steps)[None, :, None]
    before, p, after, after2 = (q[:, None, :] for q in (before, p, after, after2))
    curve = p + 0.5 * t * (
        after - before + t * (2 * before - 5 * p + 4 * after - after2 + t * (3 * (p - after) + after2 - before))
    )
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, after[-1]])


def dome(grid: Grid, line: np.ndarray, depth: float) -> np.ndarray:
    """Depth of a rounded body with the outline `line`: steep at its edge, `depth` where it is thickest."""
    inside = grid.fill(line)
    span = np.ptp(line, axis=0).min() / 2
    distance = cv2.distanceTransform((inside > 0.5).astype(np.uint8), cv2.DIST_L2, 3) / np.float32(grid.scale * span)
    out = np.clip(1 - distance, 0, 1)
    return np.float32(depth) * np.sqrt(np.maximum(1 - out * out, 0.12)) * inside


def fourth(values: np.ndarray) -> np.ndarray:
    """The fourth power; far faster than ``**``."""
    square = values * values
    return square * square


def soft_step(values: np.ndarray, width: float) -> np.ndarray:
    """0 below 0, 1 above `width`, smooth between."""
    t = np.clip(values / np.asarray(width, np.float32), 0, 1)
    return t * t * (3 - 2 * t)


def table_at(where: np.ndarray, table: list[tuple[float, float]]) -> np.ndarray:
    """A table of (position, value) read at `where` (S, 1), evenly spaced cm; its corners are rounded over 1 cm."""
    positions, values = zip(*table)
    read = np.interp(where, positions, values).astype(np.float32)
    spacing = float(where[-1, 0] - where[0, 0]) / (len(where) - 1)
    half = int(np.ceil(2.5 / spacing))
    kernel = np.exp(-0.5 * (np.arange(-half, half + 1) * spacing) ** 2)
    padded = np.pad(read[:, 0], half, mode="edge")
    return np.convolve(padded, kernel / kernel.sum(), "valid").astype(np.float32)[:, None]
