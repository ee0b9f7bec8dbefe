"""How far readers, or classifiers, agree: kappa, McNemar's and Stuart-Maxwell's tests (statsmodels)."""

from __future__ import annotations

from typing import Any

import numpy as np
from statsmodels.stats.contingency_tables import SquareTable, mcnemar
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa
from statsmodels.stats.inter_rater import fleiss_kappa as fleiss

from carina.errors import CarinaError

EXACT_BELOW = 25  # discordant pairs; the chi-squared distribution is too rough for fewer


def _codes(*readings: np.ndarray) -> tuple[list[np.ndarray], list]:
    """Readings as numbers 0 .. k - 1 over the categories that any of them uses."""
    arrays = [np.asarray(reading) for reading in readings]
    if len({array.shape for array in arrays}) > 1:
        raise CarinaError(
            f"readings of {' and '.join(str(a.shape) for a in arrays)} are not of the same images; give one category each"
        )
    for array in arrays:
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise CarinaError("a reading is missing (NaN); leave images out that not every reader has read")
    categories, codes = np.unique(np.concatenate([array.ravel() for array in arrays]), return_inverse=True)
    parts = np.split(codes, np.cumsum([array.size for array in arrays])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, arrays)], list(categories)


def cross_table(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(k, k) counts: rows the categories of `a`, columns those of `b`."""
    (a, b), categories = _codes(a, b)
    table = np.zeros((len(categories), len(categories)), dtype=np.int64)
    np.add.at(table, (a.ravel(), b.ravel()), 1)
    return table


def cohen_kappa(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Cohen's kappa (1960) of two readers (n,), with its 95 % interval; NaN where both use one category only."""
    table = cross_table(a, b)
    if len(table) < 2:
        return {"kappa": float("nan"), "low": float("nan"), "high": float("nan")}
    found = cohens_kappa(table)
    return {"kappa": float(found.kappa), "low": float(found.kappa_low), "high": float(found.kappa_upp)}


def fleiss_kappa(readings: np.ndarray) -> float:
    """Fleiss' kappa (1971) of readings (n, readers) of any categories; NaN where only one category is used."""
    (readings,), categories = _codes(readings)
    if readings.ndim != 2 or readings.shape[1] < 2:
        raise CarinaError(f"readings {readings.shape} must be (images, readers) with two readers or more")
    return float(fleiss(aggregate_raters(readings, n_cat=len(categories))[0])) if len(categories) > 1 else float("nan")


def mcnemar_test(target: np.ndarray, called_a: np.ndarray, called_b: np.ndarray) -> dict[str, Any]:
    """Whether two classifiers are right equally often on the same images (McNemar 1947).

    target, called_a, called_b: (n,) of 0 and 1. Exact (binomial) below 25 discordant images, else chi-squared. One image a
    patient is assumed.
    """
    target, a, b = (np.asarray(values) for values in (target, called_a, called_b))
    only_a, only_b = int(((a == target) & (b != target)).sum()), int(((a != target) & (b == target)).sum())
    exact = only_a + only_b < EXACT_BELOW
    found = mcnemar([[0, only_a], [only_b, 0]], exact=exact, correction=False)
    p_value = 1.0 if only_a + only_b == 0 else min(1.0, float(found.pvalue))
    return {"only_a_right": only_a, "only_b_right": only_b, "exact": exact, "p_value": p_value}


def stuart_maxwell(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Whether two classifiers use several categories equally often on the same images (Stuart 1955, Maxwell 1970).

    a, b: (n,) categories. Categories that neither uses do not count, and categories without a discordant pair are merged
    out, so that the covariance can be inverted. p is 1 where they agree everywhere.
    """
    table = cross_table(a, b)
    moved = (table.sum(axis=1) + table.sum(axis=0) - 2 * np.diag(table)) > 0
    if not moved.any():
        return {"statistic": 0.0, "df": 0, "p_value": 1.0}
    table = table[np.ix_(moved, moved)]
    found = SquareTable(table, shift_zeros=False).homogeneity(method="stuart_maxwell")
    return {"statistic": float(found.statistic), "df": int(found.df), "p_value": float(found.pvalue)}
