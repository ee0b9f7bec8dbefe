"""How well scores rank the sick above the well: AUROC, average precision, their curves, and Youden's threshold.

Targets are 1 (present), 0 (absent) or NaN (unknown: the image is left out). A tie between a positive and a negative
counts one half in AUROC and shares one threshold in average precision, as in scikit-learn. Where only one class is
known a metric is NaN, never 0.5.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix

from carina.errors import CarinaError

BELOW_CHANCE = (
    "abnormal images lie nearer to the training normals than other normals do, so this distance measures something else "
    "than disease; turning its sign would use the labels"
)


class Ranking:
    """The scores of one label, sorted once, to be measured under any number of weightings.

    target: (n,) of 0, 1 or NaN. score: (n,), higher is worse; it must be a number wherever the target is known.
    groups: (n,) integers 0 .. G - 1 whose images share their weights, as patients do; default: each image its own (G = n).
    `positives` and `negatives` are the image indices of each class in ascending order of score; `num_unknown` counts
    the images left out.

    Only the places of negatives among the distinct scores of positives matter, so weights are first summed between
    these: a sparse product, and for a rare finding nearly all of the work.
    """

    def __init__(self, target: np.ndarray, score: np.ndarray, groups: np.ndarray | None = None):
        target, score = np.asarray(target, dtype=np.float64), np.asarray(score, dtype=np.float64)
        if target.ndim != 1 or target.shape != score.shape:
            raise CarinaError(
                f"targets {target.shape} and scores {score.shape} must be two lists of one length; give one label at a "
                "time, one target and one score an image"
            )
        known = ~np.isnan(target)
        strange = known & (target != 0) & (target != 1)
        if strange.any():
            raise CarinaError(
                f"{int(strange.sum())} of {len(target)} targets are neither 0, 1 nor unknown (the first is "
                f"{target[strange][0]:g}); let a policy decide about uncertain labels before measuring"
            )
        if np.isnan(score[known]).any():
            raise CarinaError(
                f"{int(np.isnan(score[known]).sum())} of {int(known.sum())} images with a known target have no score "
                "(NaN); score them again or leave them out of both lists"
            )
        order = np.argsort(score, kind="stable")
        self.positives = order[target[order] == 1]
        self.negatives = order[target[order] == 0]
        self.num_unknown = int((~known).sum())
        self._score, self._groups = score, np.arange(len(target)) if groups is None else groups

    @cached_property
    def _sums(self) -> tuple[csr_matrix, csr_matrix]:
        """What sums weights (G, R): those of positives by distinct score, ascending (K, G); those of negatives below the
        first of these scores, at it, between it and the second, and so on (2 K + 1, G)."""
        scores, place = np.unique(self._score[self.positives], return_inverse=True)
        negative = self._score[self.negatives]
        left = np.searchsorted(scores, negative, side="left")
        ties = left < np.searchsorted(scores, negative, side="right")
        count = int(self._groups.max(initial=-1)) + 1

        def summing(rows: np.ndarray, images: np.ndarray, height: int) -> csr_matrix:
            return csr_matrix((np.ones(len(rows)), (rows, self._groups[images])), shape=(height, count))

        return summing(place, self.positives, len(scores)), summing(
            2 * left + ties, self.negatives, 2 * len(scores) + 1
        )

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """Area under the ROC curve (R,) for `weights` (G, R) >= 0; NaN where a class has no weight.

        The Mann-Whitney form (Bamber 1975): the share of positive-negative pairs in the right order, ties one half.
        """
        positive, negative = (sums @ weights for sums in self._sums)
        below = np.cumsum(negative, axis=0)
        won = np.einsum("kr,kr->r", positive, below[:-1:2] + 0.5 * negative[1::2])
        return ratio(won, positive.sum(axis=0) * below[-1])

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Average precision (R,) for `weights` (G, R) >= 0; NaN where a class has no weight.

        The sum over thresholds of precision times the step in recall, without interpolation.
        """
        positive, negative = (sums @ weights for sums in self._sums)
        hits = np.cumsum(positive[::-1], axis=0)[::-1]
        alarms = np.cumsum(negative[::-1], axis=0)[::-1][1::2]
        called = hits + alarms
        precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
        value = ratio(np.einsum("kr,kr->r", positive, precision), positive.sum(axis=0))
        return np.where(negative.sum(axis=0) > 0, value, np.nan)


METRICS = {"auroc": Ranking.auroc, "average_precision": Ranking.average_precision}


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def _weighted(metric: str, target: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[1] != len(target):
        raise CarinaError(f"weights {weights.shape} must be (resamples, images) with {len(target)} images")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise CarinaError("weights must be finite numbers of at least 0; check how they were made")
    return METRICS[metric](Ranking(target, score), np.ascontiguousarray(weights.T))


def weighted_auroc(target: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC (R,) in [0, 1] under each row of `weights` (R, n), for instance a bootstrap's multiplicities."""
    return _weighted("auroc", target, score, weights)


def weighted_average_precision(target: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision (R,) in [0, 1] under each row of `weights` (R, n)."""
    return _weighted("average_precision", target, score, weights)


def auroc(target: np.ndarray, score: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Area under the ROC curve in [0, 1]; NaN where one class is missing.

    target: (n,) of 0, 1 or NaN (left out). score: (n,), any scale, higher is worse. weight: (n,) >= 0, default 1.
    Raises CarinaError for other targets, for NaN among the needed scores and for lists of unequal length.
    """
    weight = np.ones(len(target)) if weight is None else np.asarray(weight)
    return float(weighted_auroc(target, score, weight[None])[0])


def average_precision(target: np.ndarray, score: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Average precision in [0, 1], whose chance level is the prevalence; NaN where one class is missing.

    Arguments and errors as in `auroc`. scikit-learn gives 0 without positives and 1 without negatives; here both are
    NaN, since neither says anything about the scores.
    """
    weight = np.ones(len(target)) if weight is None else np.asarray(weight)
    return float(weighted_average_precision(target, score, weight[None])[0])


def _counts_above(target: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores, descending, with the number of positives and of negatives at or above each."""
    ranking = Ranking(target, score)
    if not len(ranking.positives) or not len(ranking.negatives):
        missing = "positive" if not len(ranking.positives) else "negative"
        raise CarinaError(f"a curve needs both classes and no image is known to be {missing}; leave this label out")
    score = np.asarray(score, dtype=np.float64)
    thresholds = np.unique(score[np.concatenate([ranking.positives, ranking.negatives])])[::-1]
    hits, alarms = (
        len(rows) - np.searchsorted(score[rows], thresholds, side="left")
        for rows in (ranking.positives, ranking.negatives)
    )
    return thresholds, hits, alarms


def roc_curve(target: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False-positive rate, true-positive rate and threshold, each (t + 1,), from (0, 0) at infinity to (1, 1).

    An image is called positive where score >= threshold. Raises CarinaError where one class is missing.
    """
    thresholds, hits, alarms = _counts_above(target, score)
    return tuple(np.concatenate([[first], rest]) for first, rest in (
        (0.0, alarms / alarms[-1]), (0.0, hits / hits[-1]), (np.inf, thresholds)
    ))  # fmt: skip


def precision_recall_curve(target: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision (t + 1,), recall (t + 1,) and threshold (t,), thresholds ascending; the last point is (1, 0).

    An image is called positive where score >= threshold. Raises CarinaError where one class is missing.
    """
    thresholds, hits, alarms = _counts_above(target, score)
    precision, recall = hits / (hits + alarms), hits / hits[-1]
    return np.append(precision[::-1], 1.0), np.append(recall[::-1], 0.0), thresholds[::-1]


def false_positive_rate(target: np.ndarray, score: np.ndarray, sensitivity: float = 0.95) -> float:
    """The share of negatives at or above the highest threshold that finds `sensitivity` of the positives, in [0, 1]; NaN
    where one class is missing."""
    ranking = Ranking(target, score)
    if not len(ranking.positives) or not len(ranking.negatives):
        return float("nan")
    _, hits, alarms = _counts_above(target, score)
    return float(alarms[np.searchsorted(hits, np.ceil(sensitivity * hits[-1] - 1e-9))] / alarms[-1])


def youden(target: np.ndarray, score: np.ndarray) -> float:
    """The score t for which sensitivity + specificity of `score >= t` is largest (Youden 1950).

    Among equally good thresholds the highest, which raises the fewest alarms. NaN where one class is missing.
    """
    ranking = Ranking(target, score)
    if not len(ranking.positives) or not len(ranking.negatives):
        return float("nan")
    thresholds, hits, alarms = _counts_above(target, score)
    # Whole numbers, so that equally good thresholds compare equal.
    return float(thresholds[np.argmax(hits * alarms[-1] - alarms * hits[-1])])
