"""Discrimination within groups of images (a view, a sex, a source) beside that over all of them.

Images of several groups ranked together are also told apart by their group, where it tells part of the label or where the
finding shows more plainly in it. Pairs of a positive and a negative of one group cannot be: the AUROC over such pairs is
what is left (stratified Mann-Whitney; van Elteren 1960).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from carina.metrics.intervals import Difference, difference
from carina.metrics.resampling import Replicates, replicate, replicate_sums


def of_group(target: np.ndarray, groups: np.ndarray, number: int) -> np.ndarray:
    """(n, L): the targets, unknown outside one group."""
    return np.where((groups == number)[:, None], np.asarray(target, dtype=np.float64), np.nan)


def by_group(
    target: np.ndarray,
    score: np.ndarray,
    groups: np.ndarray,
    patients: np.ndarray,
    metric: str = "auroc",
    resamples: int = 2000,
    seed: int = 0,
) -> list[Replicates]:
    """A metric of every group on the same resamples of all patients, so that groups and the whole can be subtracted.

    target: (n, L) of 0, 1 or NaN. score: (n, L). groups: (n,) integers 0 .. g - 1. patients: (n,); one may have images in
    several groups. Returns g `Replicates` of L labels, whose counts are those of the group. Memory is that of one group.
    """
    scores = np.asarray(score)[None]
    return [
        replicate(of_group(target, groups, number), scores, patients, metric, resamples, seed)
        for number in range(int(groups.max()) + 1)
    ]


def pairs_by_group(
    target: np.ndarray, groups: np.ndarray, patients: np.ndarray, resamples: int = 2000, seed: int = 0
) -> list[Replicates]:
    """How many pairs of a positive and a negative every group holds, on the resamples of `by_group`."""
    result = []
    for number in range(int(groups.max()) + 1):
        own = of_group(target, groups, number)
        columns = np.stack([own == 1, own == 0], axis=2)
        found = replicate_sums(columns, lambda sums: {"pairs": sums[0] * sums[1]}, own, patients, resamples, seed)
        result.append(found["pairs"])
    return result


def within_groups(parts: Sequence[Replicates], pairs: Sequence[Replicates], whole: Replicates) -> Replicates:
    """The AUROC over pairs of one group: the groups' AUROC, weighted by their pairs of a positive and a negative.

    parts, pairs: of `by_group` and `pairs_by_group`, all groups or some. whole: over all images, from `replicate` with the
    same seed and resamples, which the result can be subtracted from. NaN where no group has both classes. The counts of
    patients in a class are effective ones (Kish 1965): as many as would weigh alike, so that a group whose pairs hang on
    one positive counts as little as it tells.
    """

    def averaged(field: str) -> np.ndarray:
        total, summed = (np.zeros(getattr(whole, field).shape) for _ in range(2))
        for part, pair in zip(parts, pairs):
            values = getattr(part, field)
            weight = np.where(np.isnan(values), 0.0, getattr(pair, field))
            total += weight
            summed += np.nan_to_num(values) * weight
        return np.divide(summed, total, out=np.full(total.shape, np.nan), where=total > 0)

    weight = np.stack([pair.point[0] for pair in pairs])[:, :, None]
    patients = np.stack([part.counts[:, 3:5] for part in parts])
    squares = np.divide(weight**2, patients, out=np.zeros(patients.shape), where=weight > 0).sum(axis=0)
    effective = np.divide(weight.sum(axis=0) ** 2, squares, out=np.zeros(squares.shape), where=squares > 0)
    counts = whole.counts.copy()
    counts[:, 3:5] = np.minimum(counts[:, 3:5], np.floor(effective + 1e-9))
    figures = {field: averaged(field) for field in ("point", "boot", "jackknife")}
    return replace(whole, **figures, counts=counts)


def alike(a: Replicates, b: Replicates) -> tuple[Replicates, Replicates]:
    """Both with NaN where either has it, so that means over labels are over the same labels in every resample."""
    fields = ("point", "boot", "jackknife")
    lost = {field: np.isnan(getattr(a, field)) | np.isnan(getattr(b, field)) for field in fields}
    return tuple(
        replace(one, **{field: np.where(lost[field], np.nan, getattr(one, field)) for field in fields})
        for one in (a, b)
    )


def gap(a: Replicates, b: Replicates, label: int | None = None) -> Difference:
    """a - b where they were measured on other images of one set of resamples; it rests on the smaller counts."""
    counts = np.minimum(a.counts, b.counts)
    return difference(*(replace(one, counts=counts) for one in alike(a, b)), label)
