"""Lung fields of a frontal radiograph: a threshold and a prior of shape, combined; no learned weights.

The step published with AnatPaste (Otsu's threshold alone) deletes lungs that touch the frame and takes air for lung.
Here an anatomical template of two lungs is first laid over the picture where it separates dark from bright best;
then every pixel is judged by its brightness and by its distance to the template together. Lengths are fractions of the
side, so the mask does not depend on the resolution. Proportions are those of radiographic anatomy (e.g. Fraser and Pare,
Diagnosis of Diseases of the Chest).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import cv2
import numpy as np

from carina.imaging.photometry import collimated

_COARSE = 48  # the grid on which the template is placed
_FINE = 192  # the grid on which pixels are judged

# Where lungs can lie in a frontal chest radiograph, as fractions of the frame: the column of the spine, the distance
# from it to the outer chest wall, the row of the apices (beyond the frame where it cuts them off), the row of the
# costophrenic angles.
_PLACES = (
    np.linspace(0.42, 0.58, 7),
    np.linspace(0.26, 0.48, 7),
    np.linspace(-0.20, 0.24, 9),
    np.linspace(0.62, 0.98, 7),
)
# An ordinary chest picture, and how far pictures commonly stray from it (one standard deviation).
_USUAL = (0.50, 0.38, 0.10, 0.84)
_STRAY = (0.05, 0.07, 0.08, 0.11)
# Inner width of the chest over the height of the lungs, and its spread (of the logarithm): about 28 cm to 23 cm in
# adults at full inspiration; wider in expiration and in children.
_SHAPE, _SHAPE_STRAY = 1.2, 0.2
# A difference of less than this many standard deviations is less than "small" (Cohen 1988): no lungs are seen.
_EFFECT = 0.2


@dataclass(frozen=True)
class LungMask:
    """mask: (H, W) bool. plausible: False when only the prior stands. source: "threshold", "segmenter" or "prior".

    share: the part of the frame that the mask covers, 0 to 1.
    """

    mask: np.ndarray
    plausible: bool
    source: str
    share: float


def _template(size: int, center: float, width: float, top: float, bottom: float) -> np.ndarray:
    """(size, size) bool: two lung fields. Narrow rounded apices, steep walls, domes that fall off to the sides."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    beside = np.abs(axis - center)[None, :] / width  # 0 at the spine, 1 at the chest wall
    down = ((axis - top) / (bottom - top))[:, None]  # 0 at the apices, 1 at the costophrenic angles
    wall = np.sqrt(np.clip(1.0 - np.clip(1.0 - down, 0.0, 1.0) ** 2.2, 0.0, 1.0))
    dome = 0.84 + 0.16 * beside
    return (down > 0) & (down < dome) & (beside < wall) & (beside > 0.14)


@lru_cache(maxsize=1)
def _bank() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All places (N, 4), what lies inside (N, P) and around (N, P) the template there, its cells (N,), log prior (N,)."""
    places = np.array(list(product(*_PLACES)), dtype=np.float32)
    inside = np.stack([_template(_COARSE, *place) for place in places])
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    around = np.stack([cv2.dilate(mask.view(np.uint8), kernel).view(bool) & ~mask for mask in inside])
    prior = -0.5 * (((places - np.array(_USUAL)) / np.array(_STRAY)) ** 2).sum(axis=1)
    inside, around = (masks.reshape(len(places), -1).astype(np.float32) for masks in (inside, around))
    return places, inside, around, inside.sum(axis=1), prior


def _normalized(image: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Local contrast: what is left when mean and spread over a quarter of the side are taken out; 0 outside `body`."""
    side = image.shape[0]

    def around(values: np.ndarray) -> np.ndarray:
        # So wide a blur loses nothing on a small grid, where it is cheap.
        small = cv2.resize(values, (32, 32), interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), 8, borderType=cv2.BORDER_REFLECT)
        return cv2.resize(small, (side, side), interpolation=cv2.INTER_LINEAR)

    weight = body.astype(np.float32)
    share = around(weight) + 1e-3
    rest = (image - around(image * weight) / share) * weight
    return rest / (np.sqrt(around(rest * rest) / share) + 0.02)


def _body(image: np.ndarray) -> np.ndarray:
    """(H, W) bool without the air beside the body, which is as dark as lung but almost black and open to the frame.

    Lungs can be black and open to the frame too, in a tight crop; what covers much of the usual place of lungs is
    therefore not taken for air.
    """
    low, high = np.percentile(image, (0.5, 99.5))
    dark = (cv2.blur(image, (3, 3)) < low + 0.10 * (high - low)).astype(np.uint8)
    count, labels = cv2.connectedComponents(dark, connectivity=4)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    open_to_frame = np.zeros(count, dtype=bool)
    open_to_frame[edge] = True
    open_to_frame[0] = False
    air = open_to_frame[labels]
    usual = _template(image.shape[0], *_USUAL)
    if (air & usual).sum() > 0.3 * usual.sum():
        return np.ones(image.shape, dtype=bool)
    return cv2.dilate(air.astype(np.uint8), np.ones((3, 3), np.uint8)) == 0


def _place(coarse: np.ndarray, body: np.ndarray, aspect: float) -> np.ndarray:
    """The place (4,) where the template separates dark from bright best, weighted by how usual it is.

    Air is neither dark nor bright, and a template that takes it in loses as much contrast as it takes. aspect: width
    over height of the picture.
    """
    places, inside, around, whole, prior = _bank()
    # In steps of 1/256 every sum is exact in float32: the place is the same under any BLAS and number of threads.
    steps = np.rint(256 * np.clip(coarse, -16, 16)) / 256
    columns = np.stack([steps.ravel() * body.ravel(), body.ravel()], axis=1).astype(np.float32)
    dark, bright = inside @ columns, around @ columns
    contrast = bright[:, 0] / (bright[:, 1] + 1) - dark[:, 0] / (dark[:, 1] + 1)
    covered = dark[:, 1] / whole
    shape = np.log(2 * places[:, 1] * aspect / (places[:, 3] - places[:, 2]) / _SHAPE)
    prior = prior - 0.5 * (shape / _SHAPE_STRAY) ** 2
    return places[np.argmax(contrast - 2 * (1 - covered) + 0.05 * prior)]


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Distance to the edge of `mask` in fractions of the side, positive inside."""
    mask = mask.astype(np.uint8)
    inner = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    outer = cv2.distanceTransform(1 - mask, cv2.DIST_L2, 3)
    return (inner - outer) / mask.shape[0]


def _largest(mask: np.ndarray) -> np.ndarray:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if count < 2:
        return np.zeros_like(mask, dtype=bool)
    return labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))


def _hull(mask: np.ndarray) -> np.ndarray:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = np.zeros(mask.shape, dtype=np.uint8)
    if contours:
        cv2.fillConvexPoly(hull, cv2.convexHull(np.concatenate(contours)), 1)
    return hull.astype(bool)


def lung_mask(image: np.ndarray, segmenter: Callable[[np.ndarray], np.ndarray] | None = None) -> LungMask:
    """The lung fields of a frontal chest radiograph, with the part behind the heart where the shape suggests it.

    image: (H, W) float32 in [0, 1], bright = dense, square pixels. Where the result is not plausible (a side missing,
    very unequal sides, far too small or large, no darker than what is around), the template alone is given, with
    ``plausible=False``, to be counted. The mask does not depend on the number of threads.

    segmenter: takes the picture without its flat margins, (h, w) as above, and returns the probability of lung, (h, w)
    in [0, 1]. Lung is then what has at least one half; it has to pass the same check.
    """
    area = collimated(image)
    inside = np.ascontiguousarray(image[area])
    fine = cv2.resize(inside, (_FINE, _FINE), interpolation=cv2.INTER_AREA)
    body = _body(fine)
    local = _normalized(fine, body)
    small = (_COARSE, _COARSE)
    coarse_body = cv2.resize(body.astype(np.float32), small, interpolation=cv2.INTER_AREA) > 0.5
    coarse = cv2.resize(local, small, interpolation=cv2.INTER_AREA)
    center, *_ = place = _place(coarse, coarse_body, inside.shape[1] / inside.shape[0])
    template = _template(_FINE, *place)
    depth = _signed_distance(template)

    inner, near = template & body, (depth < 0) & (depth > -0.08) & body
    if not inner.any() or not near.any():
        inner, near = template, ~template
    dark, bright = local[inner].mean(), local[near].mean()
    spread = 0.5 * (local[inner].std() + local[near].std()) + 1e-6
    halves = slice(0, round(float(center) * _FINE)), slice(round(float(center) * _FINE), _FINE)
    if segmenter is None:
        # Log odds of two Gaussians of one spread, and of the template, whose edge is sure to about 3 % of the side.
        evidence = (bright - dark) * ((bright + dark) / 2 - local) / spread**2 + depth / 0.03
        candidate = (cv2.GaussianBlur(evidence, (0, 0), 0.01 * _FINE) > 0) & body
        sides = [
            _lung(_only(candidate, half), _only(template, half), depth, inward) for half, inward in zip(halves, (1, -1))
        ]
        mask, source = sides[0] | sides[1], "threshold"
    else:
        mask, source = np.asarray(segmenter(inside)) >= 0.5, "segmenter"
        assert mask.shape == inside.shape, f"a segmenter gave {mask.shape} for a picture of {inside.shape}"
        reduced = cv2.resize(mask.astype(np.float32), (_FINE, _FINE), interpolation=cv2.INTER_AREA) >= 0.5
        sides = [_only(reduced, half) for half in halves]
    plausible = _plausible(sides, template) and bool(bright - dark >= _EFFECT * spread)
    if not plausible:
        mask, source = template, "prior"
    full = np.zeros(image.shape, dtype=bool)
    full[area] = cv2.resize(mask.astype(np.float32), inside.shape[::-1], interpolation=cv2.INTER_LINEAR) >= 0.5
    return LungMask(full, plausible, source, float(full.mean()))


def _only(mask: np.ndarray, columns: slice) -> np.ndarray:
    result = np.zeros_like(mask)
    result[:, columns] = mask[:, columns]
    return result


def _lung(side: np.ndarray, field: np.ndarray, depth: np.ndarray, inward: int) -> np.ndarray:
    """One lung, whole, from the pixels of its side; `field` is the template of that side.

    inward: 1 when the spine lies to its right in the picture, else -1. The heart lies before the lung, not beside it: in
    every row the lung reaches from the chest wall to the spine.
    """
    side = cv2.morphologyEx(side.astype(np.uint8), cv2.MORPH_CLOSE, _disk(0.04))
    side = _largest(cv2.morphologyEx(side, cv2.MORPH_OPEN, _disk(0.06)))
    side = side | (_hull(side) & (depth > -0.01))
    beside = np.logical_or.accumulate(side[:, ::inward], axis=1)[:, ::inward]
    return side | (beside & field)


def _disk(fraction: float) -> np.ndarray:
    side = 2 * round(fraction * _FINE / 2) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _plausible(sides: list[np.ndarray], template: np.ndarray) -> bool:
    """Both sides there, neither more than thrice the other, and 10 % to 65 % of the frame together."""
    areas = sorted(float(side.mean()) for side in sides)
    both = sides[0] | sides[1]
    overlap = float((both & template).sum() / (both | template).sum())
    return areas[0] > 0.03 and areas[1] <= 3 * areas[0] and 0.10 <= sum(areas) <= 0.65 and overlap >= 0.4
