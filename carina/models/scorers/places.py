"""What scorers of maps share: channels, sizes, and the covariance of normal images at every place."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from carina.draws import permutation
from carina.models.scorers.base import ScorerSettings

SHRINKAGE = 0.01  # of the identity, added to every covariance


def chosen_channels(count: int, settings: ScorerSettings) -> torch.Tensor:
    """`dimensions` of the channels (K,), drawn by the seed; all of them where there are no more."""
    kept = min(count, settings.dimensions or count)
    return torch.from_numpy(np.sort(permutation(count, "channels", settings.seed)[:kept]))


def finest(shapes: torch.Tensor) -> tuple[int, int]:
    """(h, w) of the finest of the maps' shapes (sizes, 3)."""
    return tuple(shapes[:, 1:].amax(dim=0).tolist())


def resized(maps: torch.Tensor, side: tuple[int, int]) -> torch.Tensor:
    """Maps (B, D, h, w) as (B, D, *side), bilinear; the same tensor where nothing changes."""
    return maps if maps.shape[2:] == side else F.interpolate(maps, side, mode="bilinear", align_corners=False)


def stacked(read: list[torch.Tensor], shapes: torch.Tensor) -> torch.Tensor:
    """Maps (B, D, h, w) of several sizes as one, resized to the finest."""
    return torch.cat([resized(part, finest(shapes)) for part in read], dim=1) if len(read) > 1 else read[0]


def whitening(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (h, w, K) of values (h, w, N, K) and matrices (h, w, K, K) that make Mahalanobis' distance at every place the
    length of matrix @ (value - mean).

    Covariances get 0.01 of the identity, as in PaDiM (Defard et al. 2021), in the unit of the mean variance of all channels
    and places, so that it means the same whatever the length of features.
    """
    count, channels = values.shape[2:]
    center = values.mean(dim=2)
    unit = values.var(dim=2, correction=0).mean().double().clamp(min=1e-18)
    identity = torch.eye(channels, dtype=torch.float64, device=values.device)
    matrices = torch.empty(*center.shape, channels, device=values.device)
    for row in range(len(center)):
        apart = (values[row] - center[row, :, None]).double()
        covariance = apart.transpose(1, 2) @ apart / (count - 1) + SHRINKAGE * unit * identity
        lower = torch.linalg.cholesky(covariance)
        matrices[row] = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return center, matrices
