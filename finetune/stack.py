"""From scores that nothing was fitted on to a predictor's numbers: weights of the stack, temperatures, thresholds.

The stack's probability is the weighted mean of its members' probabilities, with weights by finding that are not negative
and sum to one, fitted by the log-loss of scores that no member was fitted on (stacking: Wolpert 1992, with the restriction
to convex weights of Breiman 1996; for findings and resolutions Haque et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from carina.metrics.calibration import operating_threshold, temperature
from carina.metrics.ranking import auroc
from carina.models.predictor import calibrated, logits_of

PRIOR = 20.0  # patients that the prior at equal weights is worth
SCARCE = 20  # patients of the rarer class below which it is said that there is little to go by
STEPS, ENOUGH = 5000, 1e-9
TINY = 1e-12


@dataclass(frozen=True)
class Stack:
    """weights: (L, M), rows summing to 1. notes: by label, why they say little."""

    weights: np.ndarray
    notes: dict[str, str]


def mixture_weights(likelihood: np.ndarray, counts: np.ndarray, pull: float) -> np.ndarray:
    """(M,) weights >= 0 with sum 1 that maximize sum_i c_i log(sum_m w_m q_im) + pull / M * sum_m log w_m.

    likelihood: (N, M) of q, the probability that each member gave to what turned out true. counts: (N,) of c >= 0, what each
    row counts. The sum is concave, and the expectation-maximization of mixture weights climbs it to its one maximum
    (Dempster, Laird and Rubin 1977). The second term is a Dirichlet prior with its mode at equal weights.
    """
    likelihood = np.maximum(likelihood, TINY)
    likelihood = likelihood / likelihood.max(axis=1, keepdims=True)
    total, members = counts.sum(), likelihood.shape[1]
    weights = np.full(members, 1 / members)
    for _ in range(STEPS):
        shares = weights * (likelihood * (counts / (likelihood @ weights))[:, None]).sum(axis=0)
        new = (shares + pull / members) / (total + pull)
        moved, weights = np.abs(new - weights).max(), new
        if moved < ENOUGH:
            break
    return weights / weights.sum()


def stack_weights(
    targets: np.ndarray, parts: Sequence[np.ndarray], patients: Sequence[str], labels: Sequence[str]
) -> Stack:
    """Weights by finding from targets (N, L) of 0, 1 or NaN and out-of-fold probabilities (N, L) of M members.

    Every patient counts once, its images in equal parts. Members of nearly equal worth can hardly be told apart, and weights
    that follow their noise cost more than equal ones, so a Dirichlet prior worth PRIOR patients pulls toward these. That
    says most where positives are few: of negatives that all members are sure of nothing is learned about the weights. On
    cross-fitted scores of NIH training patients, weights fitted on 15 or 50 % of them had the least log-loss on the others
    with a prior of about 10, nearly the least and a better AUROC with 20, and lost to equal weights without one. A finding
    with one class only has equal weights.
    """
    patients = np.asarray(patients)
    weights, notes = np.full((len(labels), len(parts)), 1 / len(parts)), {}
    if len(parts) == 1:
        return Stack(weights, notes)
    for column, label in enumerate(labels):
        scores = np.stack([part[:, column] for part in parts], axis=1).astype(np.float64)
        use = ~np.isnan(targets[:, column]) & ~np.isnan(scores).any(axis=1)
        sick = targets[use, column] == 1
        rarer = min(len(set(patients[use][sick])), len(set(patients[use][~sick])))
        if rarer == 0:
            notes[label] = "equal weights: no scores of both classes to fit them on"
            continue
        _, person, images = np.unique(patients[use], return_inverse=True, return_counts=True)
        likelihood = np.where(sick[:, None], scores[use], 1 - scores[use])
        weights[column] = mixture_weights(likelihood, 1 / images[person], PRIOR)
        if rarer < SCARCE:
            notes[label] = f"little to go by: {rarer} patient{'s' * (rarer > 1)} in the rarer class"
    return Stack(weights, notes)


def ranked(
    truth: np.ndarray, parts: dict[int, np.ndarray], labels: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """AUROC by label and scale of scores (N, L) by scale; None where one class is missing."""
    return {
        label: {str(scale): _ranking(truth[:, column], part[:, column]) for scale, part in parts.items()}
        for column, label in enumerate(labels)
    }


def _ranking(target: np.ndarray, score: np.ndarray) -> float | None:
    use = ~np.isnan(target) & ~np.isnan(score)
    value = auroc(target[use], score[use])
    return None if np.isnan(value) else round(value, 4)


def decisions(
    truth: np.ndarray, scores: np.ndarray, labels: Sequence[str], rule: str, tempered: bool, source: str
) -> dict[str, Any]:
    """A temperature for each label, and on the probabilities that it gives the threshold of the rule.

    truth: (N, L) of 0, 1 or NaN. scores: (N, L) probabilities of the stack, NaN where there are none. source: what they
    are, in words. A label without both classes keeps its temperature 1 and gets the threshold 0.5.
    """
    temperatures, thresholds = dict.fromkeys(labels, 1.0), dict.fromkeys(labels, 0.5)
    missing = []
    for column, label in enumerate(labels):
        use = ~np.isnan(truth[:, column]) & ~np.isnan(scores[:, column])
        target, score = truth[use, column], scores[use, column]
        if len(np.unique(target)) < 2:
            missing.append(label)
            continue
        if tempered:
            temperatures[label] = float(temperature(target, logits_of(score)))
        thresholds[label] = float(operating_threshold(rule, target, calibrated(score, temperatures[label])))
    said = f"{source} ({rule})"
    said += "; 0.5 where those hold one class only or nothing was cross-fitted" if missing else ""
    return {
        "temperature": temperatures,
        "thresholds": thresholds,
        "threshold_rule": rule,
        "thresholds_from": said,
    }
