"""What fixed thresholds do, with intervals: sensitivity, specificity, predictive values and F1 on resamples of patients."""

from __future__ import annotations

import numpy as np

from carina.errors import CarinaError
from carina.metrics.decisions import predictive_values
from carina.metrics.ranking import ratio
from carina.metrics.resampling import Replicates, replicate_sums

NAMES = ("sensitivity", "specificity", "ppv", "npv", "f1")
AT_PREVALENCE = ("ppv_at_prevalence", "npv_at_prevalence")


def rates(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> dict[str, np.ndarray]:
    """The five figures from counts (or sums of weights) of any one shape; NaN where nothing is divided by.

    Predictive values are those at the share of positives among the counted.
    """
    return {
        "sensitivity": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "ppv": ratio(tp, tp + fp),
        "npv": ratio(tn, tn + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
    }


def replicate_decisions(
    target: np.ndarray,
    called: np.ndarray,
    patients: np.ndarray,
    prevalence: np.ndarray | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Replicates]:
    """Sensitivity, specificity, PPV, NPV and F1 of what was called, on the resamples of `replicate`.

    target: (n, L) of 0, 1 or NaN. called: (n, L) bool, decided by thresholds that were fixed on other images. patients:
    (n,). prevalence: (L,) in (0, 1), NaN where none is stated; adds `ppv_at_prevalence` and `npv_at_prevalence`, by Bayes'
    rule from the sensitivity and specificity of each resample.
    """
    target, called = np.asarray(target, dtype=np.float64), np.asarray(called, dtype=bool)
    if target.shape != called.shape:
        raise CarinaError(
            f"targets {target.shape} and decisions {called.shape} are not of the same images; give one each"
        )
    sick, well = target == 1, target == 0
    columns = np.stack([called & sick, called & well, ~called & sick, ~called & well], axis=2)
    stated = None if prevalence is None else np.asarray(prevalence, dtype=np.float64)[:, None]

    def measures(sums: np.ndarray) -> dict[str, np.ndarray]:
        found = rates(*sums)
        if stated is not None:
            found |= dict(zip(AT_PREVALENCE, _at(found["sensitivity"], found["specificity"], stated)))
        return found

    return replicate_sums(columns, measures, target, patients, resamples, seed)


def _at(sensitivity: np.ndarray, specificity: np.ndarray, prevalence: np.ndarray) -> np.ndarray:
    """(2, L, R): both predictive values; NaN in the rows of labels without a stated prevalence."""
    result = np.full((2, *sensitivity.shape), np.nan)
    told = ~np.isnan(prevalence[:, 0])
    if told.any():
        bayes = np.vectorize(predictive_values, otypes=[float, float])
        with np.errstate(invalid="ignore"):  # a resample without a class has no sensitivity or specificity
            result[:, told] = bayes(sensitivity[told], specificity[told], prevalence[told])
    return result
