"""Whether probabilities mean what they say: Brier score, calibration error, slope and intercept, and their mending.

Calibration is told at several depths (Van Calster et al., BMC Medicine 2019): in the large by the intercept, overall by the
slope, in bins, and by the Brier score, which also rewards telling the classes apart. Targets are 1, 0 or NaN (left out).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtri
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM
from statsmodels.stats.proportion import proportion_confint

from carina.errors import CarinaError
from carina.metrics.calibration import HIGHEST, LOWEST
from carina.metrics.intervals import Interval, doubt
from carina.metrics.ranking import ratio
from carina.metrics.resampling import Replicates, class_counts, patient_codes, replicate_sums

BINS = 10
EDGE = 1e-7  # how near a probability may come to 0 and 1 before its logit is taken: about what float32 tells apart


def _probabilities(target: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    target, probability = np.asarray(target, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    if target.shape != probability.shape:
        raise CarinaError(
            f"targets {target.shape} and probabilities {probability.shape} are not of the same images; give one each"
        )
    told = probability[~np.isnan(target)]
    if not ((told >= 0) & (told <= 1)).all():
        raise CarinaError("calibration is of probabilities in [0, 1]; distances of an anomaly detector are none")
    return target, probability


def bins_of(probability: np.ndarray, bins: int = BINS) -> np.ndarray:
    """(n,) bin of every probability, 0 .. bins - 1: equally many images each, and equal probabilities share one."""
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1])) if len(probability) else []
    return np.searchsorted(edges, probability, side="right")


def reliability(target: np.ndarray, probability: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """Predicted mean and observed share of every bin of `bins_of`, with Wilson's 95 % interval over images, and n."""
    target, probability = _probabilities(target, probability)
    known = ~np.isnan(target)
    target, probability = target[known], probability[known]
    rows, bin_of = [], bins_of(probability, bins)
    for number in np.unique(bin_of):
        own = bin_of == number
        low, high = proportion_confint(target[own].sum(), own.sum(), method="wilson")
        figures = {"predicted": probability[own].mean(), "observed": target[own].mean(), "low": low, "high": high}
        rows.append({**{name: float(value) for name, value in figures.items()}, "n": int(own.sum())})
    return rows


def replicate_calibration(
    target: np.ndarray,
    probability: np.ndarray,
    patients: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
    bins: int = BINS,
) -> dict[str, Replicates]:
    """Brier score and expected calibration error of labels, on the resamples of `replicate`.

    target, probability: (n, L). brier: the mean squared distance of probability and target. ece: the mean over images of
    how far the observed share of their bin lies from its mean probability (Naeini et al., AAAI 2015), in bins of equally
    many images that are cut once, on the whole sample. It is not debiased: noise within bins can only raise it, and does
    so again in a resample; ask for its interval by `method="centered"`.
    """
    target, probability = _probabilities(target, probability)
    known = ~np.isnan(target)
    residual = np.where(known, probability - np.nan_to_num(target), 0.0)
    columns = np.zeros((*target.shape, 2 + bins))
    columns[..., 0], columns[..., 1] = known, residual**2
    for label in range(target.shape[1]):
        rows = np.flatnonzero(known[:, label])
        columns[rows, label, 2 + bins_of(probability[rows, label], bins)] = residual[rows, label]

    def measures(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {"brier": ratio(sums[1], sums[0]), "ece": ratio(np.abs(sums[2:]).sum(axis=0), sums[0])}

    return replicate_sums(columns, measures, target, patients, resamples, seed)


def _no_slope(target: np.ndarray, logits: np.ndarray) -> str:
    """Why no finite slope is the likeliest; empty where one is."""
    if np.ptp(logits) == 0:
        return "all scores are equal, so they have no slope"
    positive, negative = logits[target == 1], logits[target == 0]
    if positive.min() > negative.max() or positive.max() < negative.min():
        return "the classes are told apart without an error, so no slope is steep enough"
    if positive.min() == negative.max() or positive.max() == negative.min():
        return "the classes share one score only, so no slope is steep enough"
    return ""


def _intercept(target: np.ndarray, offset: np.ndarray) -> float:
    """The a whose sigmoid(a + offset) has the mean of the targets (n,), which hold both classes: the likeliest one."""
    center = logit(target.mean())
    low, high = center - offset.max(), center - offset.min()
    if low == high:
        return float(low)
    return float(brentq(lambda a: expit(a + offset).sum() - target.sum(), low, high, xtol=1e-12))


def _sandwich(design: np.ndarray, residual: np.ndarray, weight: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(k,) standard errors by patients of a logistic regression with design (n, k); NaN where it is singular."""
    count, (images, width) = int(codes.max()) + 1, design.shape
    information = design.T @ (weight[:, None] * design)
    if count < 2 or not np.isfinite(information).all() or np.linalg.cond(information) > 1 / np.finfo(float).eps:
        return np.full(width, np.nan)
    scores = np.stack([np.bincount(codes, column * residual, count) for column in design.T], axis=1)
    bread = np.linalg.inv(information)
    small = count / (count - 1) * (images - 1) / max(images - width, 1)
    return np.sqrt(small * np.diag(bread @ (scores.T @ scores) @ bread))


def _line(target: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Intercept and slope of the likeliest line on the logits; these are standardized first, so that no step overflows."""
    center, spread = logits.mean(), logits.std()
    design = np.column_stack([np.ones(len(target)), (logits - center) / spread])
    intercept, slope = GLM(target, design, Binomial()).fit(maxiter=200, tol=1e-12).params
    return float(intercept - slope * center / spread), float(slope / spread)


def calibration_line(
    target: np.ndarray, probability: np.ndarray, patients: np.ndarray, level: float = 0.95
) -> tuple[Interval, Interval]:
    """Slope and intercept of logistic recalibration (Cox 1958), with intervals that let images of a patient depend.

    target, probability: (n,). Slope b of logit P(y) = a + b logit(p): 1 is right, below 1 the probabilities are too extreme.
    Intercept a of logit P(y) = a + logit(p), the slope held at 1: 0 is right, above 0 they are too low (calibration in the
    large). Standard errors are the sandwich by patients (Liang and Zeger 1986). Probabilities are moved 1e-7 away from 0
    and 1. NaN with one class, and the slope where no finite one is the likeliest: classes told apart without an error or
    sharing one score, scores all equal. What is not finite is not estimable, and the reason is given.
    """
    target, probability = _probabilities(target, probability)
    counts = class_counts(target, patient_codes(patients))
    reason = doubt(np.array([counts]), 0)
    basis = {
        "num_patients": counts[5],
        "num_positives": counts[0],
        "num_negatives": counts[1],
        "num_unknown": counts[2],
    }
    known = ~np.isnan(target)
    target, codes = target[known], patient_codes(np.asarray(patients)[known])
    logits = logit(np.clip(probability[known], EDGE, 1 - EDGE))
    reach = float(ndtri((1 + level) / 2))

    def made(value: float, error: float, why: str = "") -> Interval:
        ends = value - reach * error, value + reach * error
        if not (reason or why or np.isfinite([value, *ends]).all()):
            why = "its standard error cannot be computed"
        said = "; ".join(part for part in (reason, why) if part)
        return Interval(value, *ends, "sandwich", level, 0, **basis, estimable=not said, reason=said)

    if not (counts[0] and counts[1]):
        return (made(float("nan"), float("nan")),) * 2
    ones = np.ones((len(target), 1))
    level_at = _intercept(target, logits)
    likely = expit(level_at + logits)
    intercept = made(level_at, float(_sandwich(ones, target - likely, likely * (1 - likely), codes)[0]))
    if why := _no_slope(target, logits):
        return made(float("nan"), float("nan"), why), intercept
    start, slope = _line(target, logits)
    likely = expit(start + slope * logits)
    error = _sandwich(np.column_stack([ones, logits]), target - likely, likely * (1 - likely), codes)[1]
    return made(slope, float(error)), intercept


def recalibration(target: np.ndarray, probability: np.ndarray) -> tuple[float, float]:
    """Temperature T and intercept a, so that sigmoid(logit(p) / T + a) is the likeliest on targets (n,) of 0, 1 or NaN.

    T stays in [0.05, 20], as in `temperature`; it is 1 where all scores are equal; (1, 0), which changes nothing, where
    only one class is known.
    """
    target, probability = _probabilities(target, probability)
    known = ~np.isnan(target)
    target, logits = target[known], logit(np.clip(probability[known], EDGE, 1 - EDGE))
    if not ((target == 1).any() and (target == 0).any()):
        return 1.0, 0.0
    if np.ptp(logits) == 0:
        slope = 1.0
    elif _no_slope(target, logits):
        slope = 1 / LOWEST if logits[target == 1].mean() > logits[target == 0].mean() else 1 / HIGHEST
    else:
        slope = float(np.clip(_line(target, logits)[1], 1 / HIGHEST, 1 / LOWEST))
    return 1 / slope, _intercept(target, slope * logits)


def recalibrated(probability: np.ndarray, temperature: float, intercept: float) -> np.ndarray:
    """sigmoid(logit(p) / T + a)."""
    return expit(logit(np.clip(probability, EDGE, 1 - EDGE)) / temperature + intercept)
