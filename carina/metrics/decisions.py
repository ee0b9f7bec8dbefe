"""What a threshold does: sensitivity, specificity, predictive values at a stated prevalence, F1, net benefit."""

from __future__ import annotations

from typing import Any

import numpy as np
from statsmodels.stats.proportion import proportion_confint

from carina.errors import CarinaError


def confusion(target: np.ndarray, score: np.ndarray, threshold: float) -> dict[str, int]:
    """Counts tp, fp, fn, tn of `score >= threshold`; unknown targets (NaN) are left out."""
    target, score = np.asarray(target, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if target.shape != score.shape:
        raise CarinaError(f"targets {target.shape} and scores {score.shape} are not of the same images; give one each")
    called, sick, well = score >= threshold, target == 1, target == 0
    return {
        "tp": int((called & sick).sum()),
        "fp": int((called & well).sum()),
        "fn": int((~called & sick).sum()),
        "tn": int((~called & well).sum()),
    }


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> tuple[float, float]:
    """Positive and negative predictive value at a prevalence in (0, 1) by Bayes' rule; NaN where nothing is called."""
    if not 0 < prevalence < 1:
        raise CarinaError(f"prevalence={prevalence} is not a share between 0 and 1; state the one of your population")
    right, alarms = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    cleared, missed = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    positive = right / (right + alarms) if right + alarms > 0 else float("nan")
    return positive, cleared / (cleared + missed) if cleared + missed > 0 else float("nan")


def operating_point(
    target: np.ndarray, score: np.ndarray, threshold: float, prevalence: float | None = None
) -> dict[str, Any]:
    """Figures of one threshold that was fixed on other images.

    sensitivity and specificity with Wilson's 95 % intervals (one image a patient is assumed), F1, and predictive values at
    `prevalence` (default: that of these images, which is said to be so). None where a class is missing.
    """
    counts = confusion(target, score, threshold)
    sick, well = counts["tp"] + counts["fn"], counts["tn"] + counts["fp"]
    sensitivity = counts["tp"] / sick if sick else float("nan")
    specificity = counts["tn"] / well if well else float("nan")
    stated = prevalence if prevalence is not None else sick / (sick + well) if sick + well else float("nan")
    values = predictive_values(sensitivity, specificity, stated) if 0 < stated < 1 else (float("nan"),) * 2
    wrong = counts["fp"] + counts["fn"]
    figures = {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": values[0],
        "npv": values[1],
        "f1": 2 * counts["tp"] / (2 * counts["tp"] + wrong) if counts["tp"] + wrong else float("nan"),
        "prevalence": stated,
    }
    result: dict[str, Any] = {name: None if value != value else float(value) for name, value in figures.items()}
    for name, hits, number in (("sensitivity", counts["tp"], sick), ("specificity", counts["tn"], well)):
        low, high = proportion_confint(hits, number, method="wilson") if number else (None, None)
        result[f"{name}_low"], result[f"{name}_high"] = low, high
    return {"threshold": float(threshold), "prevalence_stated": prevalence is not None, **counts, **result}


def net_benefit(target: np.ndarray, probability: np.ndarray, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Decision curves (Vickers and Elkin 2006): benefit an image of treating by the model, treating all and treating none.

    target: (n,) of 0, 1 or NaN. probability: (n,) in [0, 1]. thresholds: (t,) in (0, 1), the probability at which one
    would treat: it says how many false alarms a hit is worth. Each result is (t,).
    """
    target, probability = np.asarray(target, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    known = ~np.isnan(target)
    if not known.any():
        raise CarinaError("no image has a known target, so nothing can be weighed; leave this label out")
    if ((probability[known] < 0) | (probability[known] > 1)).any():
        raise CarinaError("a decision curve needs probabilities in [0, 1]; distances of an anomaly detector are none")
    if ((thresholds <= 0) | (thresholds >= 1)).any():
        raise CarinaError("thresholds of a decision curve lie between 0 and 1, both left out")
    sick, count = target[known] == 1, known.sum()
    called = probability[known][None] >= thresholds[:, None]
    price = thresholds / (1 - thresholds)
    prevalence = sick.mean()
    return {
        "model": (called & sick).sum(axis=1) / count - price * (called & ~sick).sum(axis=1) / count,
        "all": prevalence - price * (1 - prevalence),
        "none": np.zeros_like(thresholds),
    }
