"""AUROC's variance without resampling: DeLong's, and Obuchowski's where patients have several images.

DeLong, DeLong and Clarke-Pearson (Biometrics 1988) by the ranks of Sun and Xu (IEEE Signal Processing Letters 2014), so
in O(n log n); Obuchowski (Biometrics 1997) for clusters. With one image a patient the second is the first. Intervals are
made on the logit scale by default (Pepe 2003), which keeps them inside [0, 1] and covers better near 1.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy.special import expit, logit, ndtr, ndtri

from carina.errors import CarinaError
from carina.metrics.intervals import Difference, Interval, doubt
from carina.metrics.ranking import Ranking
from carina.metrics.resampling import class_counts, distinct, patient_codes


def placements(target: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where every image lies among those of the other class: (rows of positives, their shares of negatives below, rows of
    negatives, their shares of positives above); a tie counts one half. Both means are the AUROC."""
    ranking = Ranking(target, score)
    score = np.asarray(score, dtype=np.float64)
    positive, negative = score[ranking.positives], score[ranking.negatives]  # both ascending
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    above = np.searchsorted(positive, negative, "left") + np.searchsorted(positive, negative, "right")
    return (
        ranking.positives,
        below / (2 * max(len(negative), 1)),
        ranking.negatives,
        1 - above / (2 * max(len(positive), 1)),
    )


def auroc_covariance(target: np.ndarray, scores: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs (k,) of several scores of the same images and their covariance (k, k); NaN where a class has one patient.

    target: (n,) of 0, 1 or NaN. scores: (k, n). patients: (n,); images of one patient may depend on each other.
    """
    target, scores = np.asarray(target, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1:] != target.shape or len(patients) != len(target):
        raise CarinaError(
            f"targets {target.shape}, scores {scores.shape} and patients ({len(patients)},) do not describe the same "
            "images; give (images,), (scores, images) and (images,)"
        )
    codes = patient_codes(patients)
    count = int(codes.max(initial=-1)) + 1
    positive, negative = codes[target == 1], codes[target == 0]
    sizes = len(positive), len(negative)
    clusters = [distinct(some) for some in (positive, negative, np.concatenate([positive, negative]))]
    if not all(sizes):
        return np.full(len(scores), np.nan), np.full((len(scores), len(scores)), np.nan)
    areas, sums = [], []
    for score in scores:
        rows_p, share_p, rows_n, share_n = placements(target, score)
        area = share_p.mean()
        areas.append(area)
        # how far the images of each patient lie from the mean, as positives and as negatives
        sums.append([np.bincount(codes[r], s - area, count) for r, s in ((rows_p, share_p), (rows_n, share_n))])
    as_positive, as_negative = np.array(sums).transpose(1, 0, 2)

    def spread(a: np.ndarray, b: np.ndarray, number: int) -> np.ndarray:
        return a @ b.T * number / (number - 1) if number > 1 else np.full((len(a), len(b)), np.nan)

    both = spread(as_positive, as_negative, clusters[2])
    m, n = sizes
    covariance = (
        spread(as_positive, as_positive, clusters[0]) / m**2 + spread(as_negative, as_negative, clusters[1]) / n**2
    )
    return np.array(areas), covariance + (both + both.T) / (m * n)


def auroc_interval(
    target: np.ndarray,
    score: np.ndarray,
    patients: np.ndarray,
    transform: Literal["logit", "none"] = "logit",
    level: float = 0.95,
) -> Interval:
    """AUROC with an interval from its variance; arguments as in `auroc_covariance`. Without width where it is 0 or 1."""
    areas, covariance = auroc_covariance(target, np.asarray(score)[None], patients)
    value, error = (
        float(areas[0]),
        math.sqrt(max(covariance[0, 0], 0)) if covariance[0, 0] == covariance[0, 0] else math.nan,
    )
    reach = ndtri((1 + level) / 2)
    if transform == "logit" and 0 < value < 1:
        low, high = expit(logit(value) + np.array([-1, 1]) * reach * error / (value * (1 - value)))
    else:
        low, high = np.clip(value + np.array([-1, 1]) * reach * error, 0, 1)
    codes = patient_codes(patients)
    name = _name(codes) + (" (logit)" if transform == "logit" else "")
    return Interval(value, float(low), float(high), name, level, **_basis(target, codes, error))


def auroc_difference(
    target: np.ndarray, score_a: np.ndarray, score_b: np.ndarray, patients: np.ndarray, level: float = 0.95
) -> Difference:
    """The paired difference a - b of two AUROCs on the same images, its interval and a two-sided p-value."""
    areas, covariance = auroc_covariance(target, np.stack([score_a, score_b]), patients)
    value = float(areas[0] - areas[1])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    error = math.sqrt(max(variance, 0)) if variance == variance else math.nan
    reach = ndtri((1 + level) / 2) * error
    p_value = float(2 * ndtr(-abs(value) / error)) if error > 0 else (1.0 if value == 0 else math.nan)
    codes = patient_codes(patients)
    basis = _basis(target, codes, error)
    return Difference(value, value - reach, value + reach, _name(codes), level, **basis, p_value=p_value)


def _name(codes: np.ndarray) -> str:
    return "delong" if codes.max(initial=-1) + 1 == len(codes) else "obuchowski"


def _basis(target: np.ndarray, codes: np.ndarray, error: float) -> dict:
    counts = class_counts(np.asarray(target, dtype=np.float64), codes)
    reason = doubt(np.array([counts]), 0)
    if error == 0:
        flat = "the scores leave no variance, so the interval has no width and says too little"
        reason = "; ".join([reason, flat] if reason else [flat])
    return {
        "resamples": 0,
        "num_patients": counts[5],
        "num_positives": counts[0],
        "num_negatives": counts[1],
        "num_unknown": counts[2],
        "estimable": not reason,
        "reason": reason,
    }
