"""Discrimination within groups of images (a view, a sex, a source) beside that over all of them.

Where a group tells part of the label, ranking images of several groups together rewards a model for knowing the group. Pairs
of a positive and a negative of one group cannot be told apart by it: the AUROC over such pairs is what is left (stratified
Mann-Whitney; van Elteren 1960).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from carina.metrics.intervals import Difference, difference
from carina.metrics.resampling import Replicates, replicate, replicate_sums


def _masked(target: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """(n, count * L): the targets of each group in turn, unknown outside it."""
    target = np.asarray(target, dtype=np.float64)
    return np.concatenate([np.where((groups == number)[:, None], target, np.nan) for number in range(count)], axis=1)


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
    several groups. Returns g `Replicates` of L labels, whose counts are those of the group.
    """
    count, labels = int(groups.max()) + 1, np.shape(target)[1]
    masked, tiled = _masked(target, groups, count), np.tile(score, (1, count))
    found = replicate(masked, tiled[None], patients, metric, resamples, seed)
    return [found.select(np.arange(labels) + number * labels) for number in range(count)]


def within_groups(
    target: np.ndarray, parts: list[Replicates], whole: Replicates, groups: np.ndarray, patients: np.ndarray
) -> Replicates:
    """The AUROC over pairs of one group: the groups' AUROC, weighted by their pairs of a positive and a negative.

    parts: AUROC by group, from `by_group`; whole: over all images, from `replicate` with the same seed and resamples, which
    the result can be subtracted from. NaN where no group has both classes.
    """
    count, labels = len(parts), np.shape(target)[1]
    masked = _masked(target, groups, count)
    columns = np.stack([masked == 1, masked == 0], axis=2)
    pairs = replicate_sums(
        columns, lambda sums: {"pairs": sums[0] * sums[1]}, masked, patients, len(whole.boot), whole.seed
    )["pairs"]
    weights = [pairs.select(np.arange(labels) + number * labels) for number in range(count)]

    def averaged(field: str) -> np.ndarray:
        values = np.stack([getattr(part, field) for part in parts])
        weight = np.stack([getattr(part, field) for part in weights])
        weight = np.where(np.isnan(values), 0.0, weight)
        total = weight.sum(axis=0)
        summed = (np.nan_to_num(values) * weight).sum(axis=0)
        return np.divide(summed, total, out=np.full(total.shape, np.nan), where=total > 0)

    return replace(whole, point=averaged("point"), boot=averaged("boot"), jackknife=averaged("jackknife"))


def gap(rest: Replicates, group: Replicates, label: int | None = None) -> Difference:
    """The figure of all other images minus that of a group, on one set of resamples; it rests on the smaller counts."""
    counts = np.minimum(group.counts, rest.counts)
    return difference(replace(rest, counts=counts), replace(group, counts=counts), label)
