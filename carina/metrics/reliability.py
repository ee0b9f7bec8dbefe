"""Whether probabilities mean what they say: Brier score, calibration error, slope and intercept, and their mending.

Calibration is told at several depths (Van Calster et al., BMC Medicine 2019): in the large by the intercept, overall by the
slope, in bins, and by the Brier score, which also rewards telling the classes apart. Targets are 1, 0 or NaN (left out).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit, logit, ndtri
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM
from statsmodels.stats.proportion import proportion_confint

from carina.errors import CarinaError
from carina.metrics.calibration import HIGHEST, LOWEST
from carina.metrics.intervals import Interval, doubt
from carina.metrics.ranking import _ratio
from carina.metrics.resampling import Replicates, class_counts, patient_codes, replicate_sums

BINS = 10
EDGE = 1e-15  # how near a probability may come to 0 and 1 before its logit is taken


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
        return {"brier": _ratio(sums[1], sums[0]), "ece": _ratio(np.abs(sums[2:]).sum(axis=0), sums[0])}

    return replicate_sums(columns, measures, target, patients, resamples, seed)


def _separated(target: np.ndarray, logits: np.ndarray) -> bool:
    """Whether a threshold tells all positives from all negatives, so that no finite slope is the likeliest."""
    positive, negative = logits[target == 1], logits[target == 0]
    return bool(positive.min() >= negative.max() or positive.max() <= negative.min())


def calibration_line(
    target: np.ndarray, probability: np.ndarray, patients: np.ndarray, level: float = 0.95
) -> tuple[Interval, Interval]:
    """Slope and intercept of logistic recalibration (Cox 1958), with intervals that let images of a patient depend.

    target, probability: (n,). Slope b of logit P(y) = a + b logit(p): 1 is right, below 1 the probabilities are too extreme.
    Intercept a of logit P(y) = a + logit(p), the slope held at 1: 0 is right, above 0 they are too low (calibration in the
    large). Standard errors are the sandwich by patients (Liang and Zeger 1986). NaN with one class, and the slope where
    the classes are told apart without an error.
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

    def made(value: float, error: float, why: str) -> Interval:
        said = "; ".join(part for part in (reason, why) if part)
        ends = value - reach * error, value + reach * error
        return Interval(value, *ends, "sandwich", level, 0, **basis, estimable=not said, reason=said)

    if not (counts[0] and counts[1]):
        return (made(float("nan"), float("nan"), ""),) * 2
    groups = {"cov_type": "cluster", "cov_kwds": {"groups": codes}} if codes.max() > 0 else {}
    large = GLM(target, np.ones((len(target), 1)), Binomial(), offset=logits).fit(**groups)
    intercept = made(float(large.params[0]), float(large.bse[0]), "")
    if _separated(target, logits):
        return made(float("nan"), float("nan"), "the classes are told apart without an error"), intercept
    line = GLM(target, np.column_stack([np.ones(len(target)), logits]), Binomial()).fit(**groups)
    return made(float(line.params[1]), float(line.bse[1]), ""), intercept


def recalibration(target: np.ndarray, probability: np.ndarray) -> tuple[float, float]:
    """Temperature T and intercept a, so that sigmoid(logit(p) / T + a) is the likeliest on targets (n,) of 0, 1 or NaN.

    T stays in [0.05, 20], as in `temperature`; (1, 0), which changes nothing, where only one class is known.
    """
    target, probability = _probabilities(target, probability)
    known = ~np.isnan(target)
    target, logits = target[known], logit(np.clip(probability[known], EDGE, 1 - EDGE))
    if not ((target == 1).any() and (target == 0).any()):
        return 1.0, 0.0
    if _separated(target, logits):
        slope = 1 / LOWEST if logits[target == 1].min() >= logits[target == 0].max() else 1 / HIGHEST
    else:
        line = GLM(target, np.column_stack([np.ones(len(target)), logits]), Binomial()).fit()
        slope = float(line.params[1])
        if 1 / HIGHEST <= slope <= 1 / LOWEST:
            return 1 / slope, float(line.params[0])
        slope = float(np.clip(slope, 1 / HIGHEST, 1 / LOWEST))
    large = GLM(target, np.ones((len(target), 1)), Binomial(), offset=slope * logits).fit()
    return 1 / slope, float(large.params[0])


def recalibrated(probability: np.ndarray, temperature: float, intercept: float) -> np.ndarray:
    """sigmoid(logit(p) / T + a)."""
    return expit(logit(np.clip(probability, EDGE, 1 - EDGE)) / temperature + intercept)
