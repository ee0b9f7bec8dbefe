"""One Gaussian with Ledoit-Wolf shrinkage (Ledoit and Wolf, J. Multivariate Anal. 2004), Mahalanobis distance."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from torch import nn

from carina.errors import CarinaError


class Gaussian(nn.Module):
    """mean (K,), whitening (D, K): the distance is the length of (f - center) @ whitening.

    `normalize` scales features to unit length first, as AnatPaste does; `components` keeps that many principal ones.
    """

    memory = False

    def __init__(self, dimension: int, components: int | None, normalize: bool, **_: object):
        super().__init__()
        self.normalize = normalize
        self.register_buffer("center", torch.zeros(dimension))
        self.register_buffer("whitening", torch.zeros(dimension, components or dimension))

    @classmethod
    def fit(
        cls, features: np.ndarray, *, components: int | None = None, normalize: bool = True, **_: object
    ) -> Gaussian:
        """features: (N, D) of normal images only."""
        count, dimension = features.shape
        if count < 2:
            raise CarinaError(f"a Gaussian needs at least 2 normal images, there are {count}; check the rows")
        if components is not None and components > min(count, dimension):
            raise CarinaError(
                f"scorer.components={components} is more than {count} images of {dimension} features allow; give at most "
                f"{min(count, dimension)}"
            )
        values = features.astype(np.float64)
        if normalize:
            values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        projection = np.eye(dimension)
        if components is not None:
            projection = PCA(components, svd_solver="full").fit(values).components_.T
        center = values.mean(axis=0)
        shrunk = LedoitWolf(assume_centered=True).fit((values - center) @ projection)
        eigenvalues, vectors = np.linalg.eigh(shrunk.covariance_)
        whitening = projection @ vectors / np.sqrt(np.maximum(eigenvalues, 1e-18))
        scorer = cls(dimension, components, normalize)
        scorer.center.copy_(torch.from_numpy(center))
        scorer.whitening.copy_(torch.from_numpy(whitening))
        return scorer

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.normalize:
            features = F.normalize(features, dim=1, eps=1e-12)
        return ((features - self.center) @ self.whitening).norm(dim=1)
