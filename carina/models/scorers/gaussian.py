"""One Gaussian with Ledoit-Wolf shrinkage (Ledoit and Wolf, J. Multivariate Anal. 2004), Mahalanobis distance."""

from __future__ import annotations

import numpy as np
import torch

from carina.errors import CarinaError
from carina.models.scorers.base import Read, Scorer, ScorerSettings, check_read, scaled_rows


class Gaussian(Scorer):
    """State: center (D,), directions (D, K), stretch (K,), rest (). With d = feature - center the distance is the length of
    rest * d + directions @ ((stretch - rest) * (directions.T @ d)): deviations count `stretch` along the directions that
    the normals fill and `rest` across them, so that D x D numbers are never needed.

    `normalize` scales features to unit length first, as AnatPaste does; `components` keeps that many principal ones.
    """

    @classmethod
    def fit(cls, read: Read, settings: ScorerSettings) -> Gaussian:
        """read: [(N, D)] of normal images only. O(N D min(N, D))."""
        check_read(read, settings)
        values = scaled_rows(read[0], settings)
        count, dimension = values.shape
        kept = settings.components
        if kept is not None and kept > min(count, dimension):
            raise CarinaError(
                f"scorer.components={kept} is more than {count} images of {dimension} features allow; give at most "
                f"{min(count, dimension)}"
            )
        center = values.mean(axis=0)
        values = values - center
        variances, directions = _principal(values)
        if kept is not None:
            variances, directions, dimension = variances[:kept], directions[:, :kept], kept
            values = values @ directions
        share = _shrinkage(values, variances)
        floor = share * variances.sum() / dimension
        stretch = 1 / np.sqrt(np.maximum((1 - share) * variances + floor, 1e-18))
        rest = 0.0 if kept is not None or len(variances) == dimension else 1 / np.sqrt(max(floor, 1e-18))
        tensors = {"center": center, "directions": directions, "stretch": stretch, "rest": rest}
        return cls(settings, **{name: torch.tensor(value, dtype=torch.float32) for name, value in tensors.items()})

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        (features,) = self.expect(read, [self.center.shape])
        features = self.scaled(features) - self.center
        along = features @ self.directions
        if self.rest == 0:
            return (along * self.stretch).norm(dim=1)
        return (self.rest * features + (along * (self.stretch - self.rest)) @ self.directions.T).norm(dim=1)


def _principal(centered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances (K,), falling, and directions (D, K) of centered rows (N, D), from the smaller of the two Gram matrices.
    K is D, or with fewer rows than features the number of directions that hold any variance."""
    count, dimension = centered.shape
    if count > dimension:
        variances, directions = np.linalg.eigh(centered.T @ centered / count)
        return np.maximum(variances, 0)[::-1].copy(), directions[:, ::-1].copy()
    variances, weights = np.linalg.eigh(centered @ centered.T / count)
    there = variances > 1e-12 * variances[-1]
    variances, weights = variances[there][::-1].copy(), weights[:, there][:, ::-1]
    return variances, centered.T @ (weights / np.sqrt(count * variances))


def _shrinkage(centered: np.ndarray, variances: np.ndarray) -> float:
    """The share of the identity, in [0, 1], that Ledoit and Wolf's section 3.3 estimates from rows (N, D) and the
    eigenvalues of their covariance."""
    count, dimension = centered.shape
    squares = (variances**2).sum()
    spread = squares - variances.sum() ** 2 / dimension
    noise = (((centered**2).sum(axis=1) ** 2).mean() - squares) / count
    return float(np.clip(noise / spread, 0, 1)) if spread > 0 else 0.0
