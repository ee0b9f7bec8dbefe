"""Temperature scaling of logits, and the operating threshold that a named rule picks.

Targets are 1, 0 or NaN (left out), as in `ranking`. Both are to be fitted on rows that nothing else was fitted on.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from carina.errors import CarinaError
from carina.metrics.ranking import roc_curve, youden

LOWEST, HIGHEST = 0.05, 20.0  # of a temperature: separable scores would send it to 0, worthless ones to infinity
RULES = "youden, f1, sensitivity:X or specificity:X with X in (0, 1]"


def temperature(target: np.ndarray, logits: np.ndarray) -> float:
    """The T in [0.05, 20] by which logits (n,) are divided for the largest likelihood (Guo et al., ICML 2017).

    The mean log-loss of sigmoid(logit / T) over targets (n,) in [0, 1] is convex in 1 / T, so the minimum is one. Targets
    may be soft. NaN among the targets or the logits leaves an image out; 1.0, which changes nothing, where what is left is
    of one class only: then every T that is small (or large) enough fits as well, and nothing can be learned from it.
    """
    target, logits = (np.asarray(values, dtype=np.float64) for values in (target, logits))
    if target.ndim != 1 or target.shape != logits.shape:
        raise CarinaError(
            f"targets {target.shape} and logits {logits.shape} must be two lists of one length; give one label at a time"
        )
    known = ~np.isnan(target) & ~np.isnan(logits)
    target, logits = target[known], logits[known]
    if not ((target > 0.5).any() and (target < 0.5).any()):
        return 1.0

    def loss(log_inverse: float) -> float:
        scaled = np.exp(log_inverse) * logits
        return float(np.mean(np.logaddexp(0, scaled) - target * scaled))

    # in the logarithm one tolerance suits all temperatures, and a function convex in 1 / T has one valley there too
    found = minimize_scalar(loss, bounds=(-np.log(HIGHEST), -np.log(LOWEST)), method="bounded", options={"xatol": 1e-9})
    return float(np.exp(-found.x))


def operating_threshold(rule: str, target: np.ndarray, score: np.ndarray) -> float:
    """The score t of `score >= t` that a rule picks on targets (n,) of 0, 1 or NaN; NaN where one class is missing.

    youden: the largest sensitivity + specificity. f1: the largest F1. sensitivity:X: the highest t that finds at least the
    share X of the positives. specificity:X: the lowest t that leaves at least the share X of the negatives; just above
    the highest score where no other does. Among equals the highest t, which raises the fewest alarms.
    """
    target, score = (np.asarray(values, dtype=np.float64) for values in (target, score))
    name, _, text = rule.partition(":")
    share = _share(text)
    if name not in ("youden", "f1", "sensitivity", "specificity") or (share is None) != (name in ("youden", "f1")):
        raise CarinaError(f"'{rule}' is no rule for a threshold; give {RULES}")
    if not ((target == 1).any() and (target == 0).any()):
        return float("nan")
    if name == "youden":
        return youden(target, score)
    alarms, found, thresholds = roc_curve(target, score)
    if name == "sensitivity":
        return float(thresholds[np.argmax(found >= share - 1e-9)])
    if name == "specificity":
        lowest = np.flatnonzero(1 - alarms >= share - 1e-9)[-1]
        return float(thresholds[lowest] if lowest else np.nextafter(thresholds[1], np.inf))
    positives, negatives = (target == 1).sum(), (target == 0).sum()
    # whole numbers, so that equally good thresholds compare equal
    hits, called = np.rint(found * positives), np.rint(found * positives) + np.rint(alarms * negatives)
    return float(thresholds[1:][np.argmax((2 * hits / (positives + called))[1:])])


def _share(text: str) -> float | None:
    """A number in (0, 1], or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value <= 1 else None
