"""Boxes that were found against boxes that are there: hits, FROC and JAFROC.

Boxes are (x0, y0, x1, y1), half-open, in any one unit (the store's are fractions of the frame). Free-response figures
follow Chakraborty and Berbaum (Medical Physics 2004); hit rates Wang et al. (ChestX-ray8, CVPR 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.stats import t as student

from carina.errors import CarinaError
from carina.metrics.resampling import patient_codes, patient_resamples

Criterion = Literal["iou", "iobb", "center"]


def overlaps(found: np.ndarray, there: np.ndarray, criterion: Criterion = "iou") -> np.ndarray:
    """(F, L) how far each found box (F, 4) lies on each true one (L, 4), in [0, 1].

    iou: intersection over union. iobb: intersection over the found box, which forgives boxes that are too small. center: 1
    where the middle of the found box lies in the true one.
    """
    found, there = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[:, None] for boxes in (found, there))
    there = there.transpose(1, 0, 2)
    for boxes in (found, there):
        if (boxes[..., 2:] <= boxes[..., :2]).any():
            raise CarinaError("a box ends where it begins or before; give (x0, y0, x1, y1) with x1 > x0 and y1 > y0")
    if criterion == "center":
        middle = (found[..., :2] + found[..., 2:]) / 2
        return ((middle >= there[..., :2]) & (middle < there[..., 2:])).all(axis=-1).astype(np.float64)
    sides = np.minimum(found[..., 2:], there[..., 2:]) - np.maximum(found[..., :2], there[..., :2])
    shared = sides.clip(min=0).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (found, there)]
    return shared / (areas[0] + areas[1] - shared if criterion == "iou" else np.broadcast_to(areas[0], shared.shape))


@dataclass(frozen=True)
class Marks:
    """What the marks of a reader or a model mean.

    lesions: (L,) the highest score of a mark on each lesion, -inf where none is. lesion_images: (L,) the image of each.
    alarms: (F,) scores of marks that lie on no lesion; alarm_images: (F,). num_images: N. patients: (N,) codes.
    """

    lesions: np.ndarray
    lesion_images: np.ndarray
    alarms: np.ndarray
    alarm_images: np.ndarray
    num_images: int
    patients: np.ndarray

    @property
    def normal(self) -> np.ndarray:
        """(N,) bool: images without a lesion."""
        return ~np.isin(np.arange(self.num_images), self.lesion_images)


def match(
    found: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    there: Sequence[np.ndarray],
    patients: np.ndarray,
    criterion: Criterion = "iou",
    at_least: float = 0.5,
) -> Marks:
    """Marks on lesions and beside them. found: boxes (F_i, 4) of every image, scores: (F_i,), there: (L_i, 4).

    A mark lies on a lesion that it overlaps by `at_least`; of several on one lesion the highest counts, and the others are
    no false alarms. A mark beside all lesions is one.
    """
    if not len(found) == len(scores) == len(there) == len(patients):
        raise CarinaError(
            f"{len(found)} lists of boxes, {len(scores)} of scores, {len(there)} of lesions and {len(patients)} patients do "
            "not describe the same images; give one of each an image, empty where there is nothing"
        )
    lesions, lesion_images, alarms, alarm_images = [], [], [], []
    for image, (boxes, values, truth) in enumerate(zip(found, scores, there)):
        values = np.asarray(values, dtype=np.float64)
        if np.isnan(values).any():
            raise CarinaError(f"a mark of image {image} has no score (NaN); score it or leave it out")
        on = overlaps(boxes, truth, criterion) >= (at_least if criterion != "center" else 0.5)
        best = np.where(on, values[:, None], -np.inf).max(axis=0, initial=-np.inf)
        lesions.append(best)
        lesion_images.append(np.full(len(best), image))
        beside = ~on.any(axis=1)
        alarms.append(values[beside])
        alarm_images.append(np.full(beside.sum(), image))
    parts = [np.concatenate(part) if part else np.empty(0) for part in (lesions, lesion_images, alarms, alarm_images)]
    codes = patient_codes(patients) if len(patients) else np.empty(0, dtype=int)
    return Marks(parts[0], parts[1].astype(int), parts[2], parts[3].astype(int), len(found), codes)


def hit_rate(marks: Marks) -> float:
    """Share of lesions that some mark lies on, whatever its score: T(IoU) or T(IoBB), by the criterion of `match`."""
    return float(np.isfinite(marks.lesions).mean()) if len(marks.lesions) else float("nan")


def froc(marks: Marks, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False alarms an image, sensitivity and threshold, each (t + 1,), thresholds descending from infinity.

    weights: (N,) of images, for instance a bootstrap's multiplicities. Sensitivity is the share of lesions.
    """
    weights = np.ones(marks.num_images) if weights is None else np.asarray(weights, dtype=np.float64)
    on, off = weights[marks.lesion_images], weights[marks.alarm_images]
    if not len(marks.lesions):
        raise CarinaError("no image has a lesion, so there is no sensitivity; give images with lesions too")
    marked = np.isfinite(marks.lesions)
    thresholds = np.unique(np.concatenate([marks.lesions[marked], marks.alarms]))[::-1]

    def above(values: np.ndarray, value_weights: np.ndarray) -> np.ndarray:
        order = np.argsort(-values, kind="stable")
        total = np.concatenate([[0.0], np.cumsum(value_weights[order])])
        return total[np.searchsorted(-values[order], -thresholds, side="right")]

    alarms = np.concatenate([[0.0], above(marks.alarms, off)]) / weights.sum()
    hits = np.concatenate([[0.0], above(marks.lesions[marked], on[marked])]) / on.sum()
    return alarms, hits, np.concatenate([[np.inf], thresholds])


def sensitivity_at(marks: Marks, rate: float, weights: np.ndarray | None = None) -> float:
    """Share of lesions found at no more than `rate` false alarms an image."""
    alarms, hits, _ = froc(marks, weights)
    return float(hits[np.searchsorted(alarms, rate + 1e-12, side="right") - 1])


def sensitivity_interval(
    marks: Marks, rate: float, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """`sensitivity_at` with the percentile interval of the patient bootstrap; resamples without a lesion are left out."""
    values = []
    for multiplicities in patient_resamples(marks.patients, resamples, seed):
        for weights in multiplicities[marks.patients].T:
            if weights[marks.lesion_images].sum() > 0:
                values.append(sensitivity_at(marks, rate, weights))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return sensitivity_at(marks, rate), float(low), float(high)


def _jafroc(marks: Marks, keep: np.ndarray) -> float:
    """The figure of merit over the images of `keep` (N,) bool."""
    highest = np.full(marks.num_images, -np.inf)
    np.maximum.at(highest, marks.alarm_images, marks.alarms)
    normal = np.sort(highest[marks.normal & keep])
    lesions = marks.lesions[keep[marks.lesion_images]]
    if not len(normal) or not len(lesions):
        return float("nan")
    won = np.searchsorted(normal, lesions, "left") + np.searchsorted(normal, lesions, "right")
    return float(won.mean() / (2 * len(normal)))


def jafroc(marks: Marks, level: float = 0.95) -> tuple[float, float, float]:
    """JAFROC's figure of merit with its jackknife interval over patients.

    The chance that a lesion is marked higher than the highest false alarm of an image without lesions; where neither is
    marked, or marks are equal, one half. NaN where there is no lesion or no image without one.
    """
    value = _jafroc(marks, np.ones(marks.num_images, dtype=bool))
    count = int(marks.patients.max(initial=-1)) + 1
    left_out = np.array([_jafroc(marks, marks.patients != patient) for patient in range(count)])
    left_out = left_out[np.isfinite(left_out)]
    if np.isnan(value) or len(left_out) < 2:
        return value, float("nan"), float("nan")
    pseudo = len(left_out) * value - (len(left_out) - 1) * left_out
    reach = student.ppf((1 + level) / 2, len(pseudo) - 1) * pseudo.std(ddof=1) / np.sqrt(len(pseudo))
    return value, float(max(value - reach, 0)), float(min(value + reach, 1))


def jafroc_difference(a: Marks, b: Marks) -> tuple[float, float, float, float]:
    """The paired difference of two figures of merit on the same images: value, interval, two-sided p (jackknife t)."""
    if a.num_images != b.num_images or not np.array_equal(a.patients, b.patients):
        raise CarinaError("the two sets of marks are not on the same images; give the same images in the same order")
    count = int(a.patients.max(initial=-1)) + 1

    def gap(keep: np.ndarray) -> float:
        return _jafroc(a, keep) - _jafroc(b, keep)

    value = gap(np.ones(a.num_images, dtype=bool))
    left_out = np.array([gap(a.patients != patient) for patient in range(count)])
    left_out = left_out[np.isfinite(left_out)]
    if np.isnan(value) or len(left_out) < 2:
        return value, float("nan"), float("nan"), float("nan")
    pseudo = len(left_out) * value - (len(left_out) - 1) * left_out
    error = pseudo.std(ddof=1) / np.sqrt(len(pseudo))
    if error == 0:
        return value, value, value, 1.0 if value == 0 else float("nan")
    reach = student.ppf(0.975, len(pseudo) - 1) * error
    p_value = 2 * student.sf(abs(value) / error, len(pseudo) - 1)
    return value, float(value - reach), float(value + reach), float(p_value)


def boxes_of(heat: np.ndarray, share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (k, 4), in fractions of the sides, around the connected parts of a heat map (H, W) that reach `share` of its
    maximum, and the highest value in each (k,); nothing where the map shows nothing."""
    heat = np.asarray(heat, dtype=np.float64)
    if not heat.max(initial=0) > 0:
        return np.empty((0, 4)), np.empty(0)
    labels, count = ndimage.label(heat >= share * heat.max(), structure=np.ones((3, 3)))
    height, width = heat.shape
    boxes = [
        (x.start / width, y.start / height, x.stop / width, y.stop / height) for y, x in ndimage.find_objects(labels)
    ]
    return np.array(boxes), np.asarray(ndimage.maximum(heat, labels, np.arange(1, count + 1)))
