"""How features lie in their space: effective rank, deviation, alignment, uniformity, and scores of nearest neighbors.

Features are (N, D) arrays of finite numbers, one row an image. Nothing here looks at labels but `knn_scores`.
"""

from __future__ import annotations

import numpy as np

from carina.errors import CarinaError

TEMPERATURE = 0.07  # of the votes of neighbors (Wu et al., CVPR 2018)
_CHUNK = 1024  # rows whose similarities are held at a time


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1 in double precision; a row of zeros stays."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not len(features):
        raise CarinaError(f"features must be (images, dimensions) with at least one image, not {features.shape}")
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def rankme(features: np.ndarray) -> float:
    """RankMe (Garrido et al., ICML 2023): how many dimensions the features fill, in [1, min(N, D)]; 0 if all are zero.

    exp of the entropy of the singular values divided by their sum, of the features as they are (not centered). The
    paper adds 1e-7 to each share to take the logarithm of zero; here 0 log 0 is 0.
    """
    values = np.linalg.svd(np.asarray(features, dtype=np.float64), compute_uv=False)
    if values[0] == 0:
        return 0.0
    share = values / values.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def dimension_deviation(features: np.ndarray) -> float:
    """Mean standard deviation per dimension of unit vectors, times sqrt(D), in [0, 1] (SimSiam, arXiv 2011.10566).

    0: all images are one point. 1: they fill the sphere. Features behind a rectifier share a direction and stay below.
    """
    unit = _unit(features)
    return float(unit.std(axis=0).mean() * unit.shape[1] ** 0.5)


def alignment(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared distance of unit vectors of two views (N, D) of the same images, in [0, 4]; 0 is best (Wang and
    Isola, ICML 2020, with alpha 2)."""
    if np.shape(a) != np.shape(b):
        raise CarinaError(
            f"two views of the same images have features of one shape, not {np.shape(a)} and {np.shape(b)}"
        )
    return float(((_unit(a) - _unit(b)) ** 2).sum(axis=1).mean())


def uniformity(features: np.ndarray) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of different images, unit vectors, in [-8, 0]; lower is more even,
    0 is one point (Wang and Isola, ICML 2020, with t 2). NaN for one image."""
    unit = _unit(features)
    squares = np.maximum(2 - 2 * unit @ unit.T, 0)[np.triu_indices(len(unit), 1)]
    return float(np.log(np.exp(-2 * squares).mean())) if len(squares) else float("nan")


def knn_scores(features: np.ndarray, targets: np.ndarray, groups: np.ndarray, neighbors: int) -> np.ndarray:
    """(N, L) shares of positive votes in [0, 1] among the nearest images by cosine; NaN where there is no neighbor.

    targets: (N, L) of 1, 0 or NaN (casts no vote on that label). groups: (N,), the patient; images of one patient are
    never neighbors. A vote counts exp(cosine / 0.07) (Wu et al., CVPR 2018). Where fewer than `neighbors` images of
    others are known, all of them vote.
    """
    unit, targets = _unit(features).astype(np.float32), np.asarray(targets, dtype=np.float64)
    if targets.ndim != 2 or len(targets) != len(unit) or len(groups) != len(unit) or neighbors < 1:
        raise CarinaError(
            f"{len(unit)} images need as many rows of targets ({targets.shape}) and groups ({len(groups)}), and at "
            f"least one neighbor, not {neighbors}"
        )
    owners = np.unique(np.asarray(groups), return_inverse=True)[1]
    known = ~np.isnan(targets)
    scores = np.full(targets.shape, np.nan)
    # labels that are known of the same images share their neighbors
    patterns, pattern_of = np.unique(known, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        voters, columns = np.flatnonzero(pattern), np.flatnonzero(pattern_of.ravel() == number)
        count = min(neighbors, len(voters))
        if count == 0:
            continue
        for start in range(0, len(unit), _CHUNK):
            rows = slice(start, start + _CHUNK)
            cosine = unit[rows] @ unit[voters].T
            cosine[owners[rows, None] == owners[voters][None]] = -np.inf
            nearest = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
            near = np.take_along_axis(cosine, nearest, axis=1).astype(np.float64)
            # relative to cosine 1, so that nothing overflows; exp(-inf) is the vote of the image's own patient
            vote = np.exp((near - 1) / TEMPERATURE)
            votes = np.einsum("rk,rkl->rl", vote, targets[voters[nearest]][..., columns])
            total = vote.sum(axis=1, keepdims=True)
            scores[rows, columns] = np.divide(votes, total, out=np.full(votes.shape, np.nan), where=total > 0)
    return scores
