"""Gaussian kernel density on pooled features (Parzen, Ann. Math. Stat. 1962), as AnatPaste scores with it."""

from __future__ import annotations

import math

import numpy as np
import torch

from carina.models.scorers.base import Read, Scorer, ScorerSettings, check_read, scaled_rows

PAIRS = 1 << 22  # distances that are held at a time


class Density(Scorer):
    """The score is -log of the density that one Gaussian of width `bandwidth` around every normal image gives, less the
    constant that depends on width and dimension alone. Holds patients' features.

    State: center (D,), bank (N, D) around it, width (). Without a bandwidth the width is 1 for features of unit length
    (Sato et al., iScience 2023), and the root mean square of their lengths for others, which is the same in their unit.
    """

    memory = True

    @classmethod
    def fit(cls, read: Read, settings: ScorerSettings) -> Density:
        """read: [(N, D)] of normal images only."""
        check_read(read, settings)
        values = scaled_rows(read[0], settings)
        length = 1.0 if settings.normalize else float(np.sqrt((values**2).sum(axis=1).mean()))
        center = values.mean(axis=0)  # distances stay, and lose fewer digits around it
        tensors = {"center": center, "bank": values - center, "width": settings.bandwidth or max(length, 1e-12)}
        return cls(settings, **{name: torch.tensor(value, dtype=torch.float32) for name, value in tensors.items()})

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        (features,) = self.expect(read, [self.center.shape])
        features = self.scaled(features) - self.center
        squares = (self.bank**2).sum(dim=1)
        scores = []
        for part in features.split(max(1, PAIRS // len(self.bank))):
            distances = (part**2).sum(dim=1, keepdim=True) + squares - 2 * part @ self.bank.T
            scores.append(-torch.logsumexp(-distances / (2 * self.width**2), dim=1))
        return torch.cat(scores) + math.log(len(self.bank))
