"""Draws of patients, and metrics measured on them.

A resample draws as many patients as there are, with replacement; all images of a patient come along, so a draw is a
multiplicity per patient. Labels, arms and runs (seeds, draws) are measured on the same resamples, which is what makes
a difference between them paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_matrix

from carina.draws import hash64, permutation
from carina.errors import CarinaError
from carina.metrics.ranking import METRICS, Ranking

MAX_JACKKNIFE = 1000
_CHUNK_CELLS = 4_000_000


@dataclass(frozen=True)
class Replicates:
    """One metric of k runs and L labels: on the sample, on every resample, and with patients left out.

    point: (k, L). boot: (R, k, L). jackknife: (J, k, L). counts: (L, 6), see `class_counts`. seed: of the draws.
    """

    point: np.ndarray
    boot: np.ndarray
    jackknife: np.ndarray
    counts: np.ndarray
    num_patients: int
    seed: int

    def select(self, labels: np.ndarray) -> Replicates:
        """The same draws, some of the labels only: a mask (L,) or indices."""
        return replace(
            self,
            point=self.point[..., labels],
            boot=self.boot[..., labels],
            jackknife=self.jackknife[..., labels],
            counts=self.counts[labels],
        )


def patient_codes(patients: np.ndarray) -> np.ndarray:
    """Patients (n,) as integers 0 .. G - 1. A missing patient is a CarinaError: it cannot be drawn."""
    patients = np.asarray(patients)
    if patients.dtype == object:
        missing = sum(p is None or p != p for p in patients)
    else:
        missing = int((patients != patients).sum())
    if missing:
        raise CarinaError(
            f"{missing} of {len(patients)} images have no patient; intervals draw patients, so name one for each image"
        )
    return np.unique(patients if patients.dtype.kind in "iuU" else patients.astype(str), return_inverse=True)[1]


def patient_resamples(codes: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap draws of patients in chunks: multiplicities (G, r) float64 for `codes` (n,) in 0 .. G - 1.

    Every column sums to G, and the draws depend on `seed` and G alone.
    """
    count = int(codes.max()) + 1
    generator = np.random.Generator(np.random.Philox(key=hash64("bootstrap", seed)))
    chunk = max(1, min(resamples, _CHUNK_CELLS // max(len(codes), count)))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = generator.integers(0, count, (size, count)) * size + np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)


def _left_out(count: int) -> Iterator[np.ndarray]:
    """Weights (G, j) with a patient left out per column; above 1,000 patients, a random group of equal size.

    BCa's acceleration is on average the same for groups as for single patients, and the work stays linear.
    """
    groups = min(count, MAX_JACKKNIFE)
    member = np.empty(count, dtype=int)
    member[permutation(count, "jackknife")] = np.arange(count) % groups
    chunk = max(1, _CHUNK_CELLS // count)
    for start in range(0, groups, chunk):
        yield (member[:, None] != np.arange(start, min(start + chunk, groups))).astype(np.float64)


def class_counts(target: np.ndarray, codes: np.ndarray) -> list[int]:
    """Positives, negatives, unknowns; patients with a positive, with a negative, with any known target."""
    positive, negative = target == 1, target == 0
    rows = [positive, negative, np.isnan(target)]
    return [int(r.sum()) for r in rows] + [distinct(codes[r]) for r in (positive, negative, positive | negative)]


def distinct(codes: np.ndarray) -> int:
    """How many different integers, 0 or more, there are; faster than sorting or hashing them."""
    return int(np.count_nonzero(np.bincount(codes)))


def replicate(
    target: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    metric: str = "auroc",
    resamples: int = 2000,
    seed: int = 0,
) -> Replicates:
    """Measure every run and label on the same resamples of patients.

    target: (n, L) of 0, 1 or NaN. scores: (k, n, L). patients: (n,). metric: "auroc" or "average_precision".
    Two calls with the same patients and seed use the same draws, whatever the scores and the metric.
    """
    target, scores = np.asarray(target, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if metric not in METRICS:
        raise CarinaError(f"metric '{metric}' has no interval here; use one of {', '.join(METRICS)}")
    if target.ndim != 2 or scores.shape[1:] != target.shape or len(patients) != len(target) or not target.size:
        raise CarinaError(
            f"targets {target.shape}, scores {scores.shape} and patients ({len(patients)},) do not describe the same "
            "images and labels; give (images, labels), (runs, images, labels) and (images,)"
        )
    if resamples < 1:
        raise CarinaError(f"resamples={resamples} leaves nothing to draw; 2000 are enough for a 95 % interval")
    codes = patient_codes(patients)
    measure = METRICS[metric]
    rankings = [[Ranking(target[:, j], run[:, j], codes) for j in range(target.shape[1])] for run in scores]

    def measured(multiplicities: np.ndarray) -> np.ndarray:
        return np.stack([[measure(ranking, multiplicities) for ranking in run] for run in rankings]).transpose(2, 0, 1)

    count = int(codes.max()) + 1
    return Replicates(
        point=measured(np.ones((count, 1)))[0],
        boot=np.concatenate([measured(m) for m in patient_resamples(codes, resamples, seed)]),
        jackknife=np.concatenate([measured(m) for m in _left_out(count)]),
        counts=np.array([class_counts(column, codes) for column in target.T]),
        num_patients=count,
        seed=seed,
    )


def replicate_sums(
    columns: np.ndarray,
    measures: Callable[[np.ndarray], dict[str, np.ndarray]],
    target: np.ndarray,
    patients: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Replicates]:
    """Measure figures that are made of sums over images, such as shares and means, on the resamples of `replicate`.

    columns: (n, L, c), what is summed; 0 where a target is unknown. measures: sums (c, L, R) -> name: (L, R). target:
    (n, L) of 0, 1 or NaN, which only the counts are taken from. patients: (n,). Images are summed by patient first, so a
    resample costs one product whatever the number of images.
    """
    columns = np.asarray(columns, dtype=np.float64)
    if columns.ndim != 3 or columns.shape[:2] != np.shape(target) or len(patients) != len(columns):
        raise CarinaError(
            f"columns {columns.shape}, targets {np.shape(target)} and patients ({len(patients)},) do not describe the same "
            "images and labels; give (images, labels, sums), (images, labels) and (images,)"
        )
    codes = patient_codes(patients)
    images, labels, width = columns.shape
    count = int(codes.max()) + 1
    by_patient = csr_matrix((np.ones(images), (codes, np.arange(images))), shape=(count, images))
    sums = (by_patient @ columns.reshape(images, labels * width)).T

    def measured(multiplicities: np.ndarray) -> dict[str, np.ndarray]:
        found = measures((sums @ multiplicities).reshape(labels, width, -1).swapaxes(0, 1))
        return {name: values.T[:, None] for name, values in found.items()}

    parts = {
        "point": [measured(np.ones((count, 1)))],
        "boot": [measured(m) for m in patient_resamples(codes, resamples, seed)],
        "jackknife": [measured(m) for m in _left_out(count)],
    }
    counts = np.array([class_counts(column, codes) for column in np.asarray(target, dtype=np.float64).T])
    result = {}
    for name in parts["point"][0]:
        joined = {part: np.concatenate([one[name] for one in found]) for part, found in parts.items()}
        joined["point"] = joined["point"][0]
        result[name] = Replicates(**joined, counts=counts, num_patients=count, seed=seed)
    return result


def _run_weights(num_runs: int, resamples: int, seed: int) -> np.ndarray:
    """(R, k): the mean of k - 1 runs drawn with replacement; one run stands as it is.

    k - 1 draws instead of k make the variance of the mean unbiased (Rao and Wu 1988), which matters for few seeds.
    """
    if num_runs == 1:
        return np.ones((resamples, 1))
    generator = np.random.Generator(np.random.Philox(key=hash64("runs", seed, num_runs)))
    drawn = generator.integers(0, num_runs, (resamples, num_runs - 1))
    return (drawn[:, :, None] == np.arange(num_runs)).mean(axis=1)


def over_runs(replicates: Replicates, label: int | None, seed: int) -> np.ndarray:
    """(R,): the bootstrap replicates of a label or the macro average, averaged over drawn runs."""
    values = over_labels(replicates.boot, label)
    return (values * _run_weights(values.shape[1], len(values), seed)).sum(axis=1)


def over_labels(values: np.ndarray, label: int | None) -> np.ndarray:
    """(..., L) -> (...): one label, or the mean over the labels that have both classes there."""
    if label is not None:
        return values[..., label]
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
