"""How well anomaly maps find lesions: pixel AUROC, per-region overlap and the pointing game.

Maps are (N, H, W) floats, higher is worse; masks (N, H, W) bool, the lesions. An image whose mask is empty is one known
to hold no lesion: its pixels count for false positives. An abnormal image whose lesions nobody marked must be left out.
Where no image holds a lesion, or no pixel is free of one, a figure is NaN, never 0.5.

Both areas are sums over the pixels of lesions. As a threshold falls past the value of one such pixel, the curve rises by
that pixel's weight, at the false-positive rate of its value; so all that is needed is, for each, how many lesion-free
pixels lie above it: one sort of those, exact, ties shared as a trapezoid shares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from carina.errors import CarinaError
from carina.metrics.intervals import interval
from carina.metrics.resampling import Replicates, patient_codes, patient_resamples

LIMIT = 0.3  # false-positive rate up to which AUPRO integrates (Bergmann et al., CVPR 2019)
EIGHT = np.ones((3, 3), dtype=bool)  # pixels that touch at a corner are one region
_BINS = 1000  # of equal false-positive rate, on which resamples are measured


def lesion_regions(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-connected regions of masks (N, H, W): the region of every lesion pixel in C order (P,), and the pixels of each
    region (R,)."""
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = EIGHT  # never from image to image
    labels, count = ndimage.label(masks, structure)
    region = labels[masks] - 1
    return region, np.bincount(region, minlength=count)


def pixel_auroc(maps: np.ndarray, masks: np.ndarray) -> float:
    """AUROC of lesion pixels against all others, pooled over images. Large lesions weigh most; see `aupro`."""
    maps, masks = _checked(maps, masks)
    return _area(maps[masks], np.sort(maps[~masks]), np.ones(int(masks.sum())), 1.0)


def aupro(maps: np.ndarray, masks: np.ndarray, limit: float = LIMIT) -> float:
    """Area under the per-region overlap, up to a false-positive rate of `limit` and divided by it, in [0, 1].

    The overlap at a threshold is the mean over 8-connected lesion regions of the part of a region at or above it, so that
    every region weighs the same (Bergmann et al., CVPR 2019). Chance is limit / 2.
    """
    if not 0 < limit <= 1:
        raise CarinaError(f"limit={limit} is no false-positive rate to integrate up to; give one above 0, at most 1")
    maps, masks = _checked(maps, masks)
    region, size = lesion_regions(masks)
    return _area(maps[masks], np.sort(maps[~masks]), 1 / size[region], limit)


def pointing_game(maps: np.ndarray, masks: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
    """(N,) 1 where an image's highest value lies in a lesion, 0 where not, NaN without lesion (Zhang et al., IJCV 2018).

    tolerance: distance from a lesion that still counts, as a fraction of the side. Where several pixels share the
    highest value the result is the part of them that hits, so that a map that says nothing scores the lesion's share.
    """
    maps, masks = _checked(maps, masks)
    hits = np.full(len(maps), np.nan)
    for number in np.flatnonzero(masks.any(axis=(1, 2))):
        near = masks[number]
        if tolerance > 0:
            near = ndimage.distance_transform_edt(~near) <= tolerance * near.shape[1]
        hits[number] = near[maps[number] == maps[number].max()].mean()
    return hits


def box_masks(boxes: Sequence[Sequence[Sequence[float]]], side: int) -> np.ndarray:
    """(N, side, side) bool: the union of each image's boxes (x0, y0, x1, y1), half-open, in fractions of the frame.

    A pixel belongs to a box that holds its center; a box that holds no center marks the pixel around its own.
    """
    masks = np.zeros((len(boxes), side, side), dtype=bool)
    for mask, some in zip(masks, boxes):
        for box in some:
            spans = []
            for low, high in ((box[1], box[3]), (box[0], box[2])):
                first, end = (int(np.ceil(edge * side - 0.5)) for edge in (low, high))
                if first >= end:
                    first = int((low + high) / 2 * side)
                    end = first + 1
                spans.append(slice(max(first, 0), max(end, 0)))
            mask[tuple(spans)] = True
    return masks


def localization(
    maps: np.ndarray, masks: np.ndarray, patients: np.ndarray, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """All three with intervals: JSON values, `Interval.to_dict()` under pixel_auroc, aupro and pointing_game.

    patients: (N,), the unit that is resampled. The figures are exact; resamples are measured at 1,000 thresholds that
    part the lesion-free pixels evenly. `num_positives` and `num_negatives` count images with lesions and images with
    lesion-free pixels. `chance`: what a map that says nothing gets.
    """
    maps, masks = _checked(maps, masks)
    region, size = lesion_regions(masks)
    hits = pointing_game(maps, masks)
    points = {
        "pixel_auroc": (pixel_auroc(maps, masks), _resampled_area(maps, masks, np.ones(len(region)), 1.0)),
        "aupro": (aupro(maps, masks), _resampled_area(maps, masks, 1 / size[region], LIMIT)),
        "pointing_game": (_mean(hits), _resampled_mean(hits)),
    }
    codes = patient_codes(patients)
    draws = np.concatenate(list(patient_resamples(codes, resamples, seed)), axis=1)[codes]
    with_lesion, free = masks.any(axis=(1, 2)), ~masks.all(axis=(1, 2))
    sides = [int(with_lesion.sum()), int(free.sum()), 0]
    sides += [len(np.unique(codes[rows])) for rows in (with_lesion, free, np.ones(len(maps), bool))]
    result: dict[str, Any] = {
        "images": len(maps),
        "images_with_lesions": sides[0],
        "regions": len(size),
        "limit": LIMIT,
        "chance": {
            "pixel_auroc": 0.5,
            "aupro": LIMIT / 2,
            "pointing_game": _json(masks.mean(axis=(1, 2))[with_lesion]),
        },
    }
    for name, (point, measure) in points.items():
        replicates = Replicates(
            point=np.array([[point]]),
            boot=measure(draws)[:, None, None],
            jackknife=np.empty((0, 1, 1)),
            counts=np.array([sides]),
            num_patients=int(codes.max()) + 1,
            seed=seed,
        )
        result[name] = interval(replicates, 0, "percentile").to_dict()
    return result


def _checked(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    maps, masks = np.asarray(maps), np.asarray(masks)
    if maps.ndim != 3 or maps.shape != masks.shape or masks.dtype != bool or not maps.size:
        raise CarinaError(
            f"maps {maps.shape} and masks {masks.shape} ({masks.dtype}) do not fit; give both as (images, height, width), "
            "masks as bool"
        )
    bad = int((~np.isfinite(maps).all(axis=(1, 2))).sum())
    if bad:
        raise CarinaError(
            f"{bad} of {len(maps)} anomaly maps hold values that are no finite numbers; check the backbone"
        )
    return maps, masks


def _passed(above: np.ndarray, up_to: np.ndarray, limit: float) -> np.ndarray:
    """How much of the false-positive rates 0 .. limit lies beyond a step that is spread evenly from `above` to `up_to`:
    the mean of max(limit - u, 0) over u between them."""
    width = up_to - above
    whole = np.maximum(limit - (above + up_to) / 2, 0)  # the step ends before the limit, or has no width
    cut = np.maximum(limit - above, 0) ** 2 / np.where(width > 0, 2 * width, 1)
    return np.where((width > 0) & (up_to > limit), cut, whole)


def _area(values: np.ndarray, free: np.ndarray, weights: np.ndarray, limit: float) -> float:
    """values, weights (P,): of lesion pixels. free: the lesion-free pixels' values, ascending."""
    if not len(values) or not len(free):
        return float("nan")
    above, up_to = (1 - np.searchsorted(free, values, side=side) / len(free) for side in ("right", "left"))
    return float((weights * _passed(above, up_to, limit)).sum() / (limit * weights.sum()))


def _resampled_area(
    maps: np.ndarray, masks: np.ndarray, weights: np.ndarray, limit: float
) -> Callable[[np.ndarray], np.ndarray]:
    """As `_area` for every column of image weights (N, R) -> (R,), at `_BINS` thresholds instead of all."""
    free = maps[~masks]
    edges = np.unique(np.quantile(free, np.linspace(0, 1, _BINS + 1)[1:-1])) if free.size else np.empty(0)

    def counted(which: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        """(N, bins) of pixels by image and bin, highest values first."""
        image = np.nonzero(which)[0]
        cell = image * (len(edges) + 1) + (len(edges) - np.searchsorted(edges, maps[which], side="right"))
        found = np.bincount(cell, weight, minlength=len(maps) * (len(edges) + 1))
        return found.reshape(len(maps), -1).astype(np.float64)

    negatives, positives = np.cumsum(counted(~masks, None), axis=1), counted(masks, weights)

    def measure(images: np.ndarray) -> np.ndarray:
        below = images.T @ negatives
        total, gained = below[:, -1:], images.T @ positives
        rates = np.divide(below, total, out=np.full(below.shape, np.nan), where=total > 0)
        before = np.concatenate([np.zeros((len(rates), 1)), rates[:, :-1]], axis=1)
        area, whole = (gained * _passed(before, rates, limit)).sum(axis=1), limit * gained.sum(axis=1)
        return np.divide(area, whole, out=np.full(len(area), np.nan), where=whole > 0)

    return measure


def _resampled_mean(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    known = ~np.isnan(values)

    def measure(images: np.ndarray) -> np.ndarray:
        weight = images[known]
        total = weight.sum(axis=0)
        return np.divide(values[known] @ weight, total, out=np.full(len(total), np.nan), where=total > 0)

    return measure


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _json(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
