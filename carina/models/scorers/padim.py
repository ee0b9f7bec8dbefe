"""PaDiM: a Gaussian at every place of the feature maps (Defard et al., ICPR workshops 2021)."""

from __future__ import annotations

import torch

from carina.models.scorers.base import Read, Scorer, ScorerSettings, check_read
from carina.models.scorers.memory import chosen_channels
from carina.models.scorers.patchcore import finest, stacked

SHRINKAGE = 0.01  # of the identity, added to every covariance


class Padim(Scorer):
    """A place's distance is Mahalanobis' to the normals' Gaussian there, over `dimensions` channels drawn at random; the
    score is the largest. Maps of several sizes are resized to the finest and stacked.

    The covariance gets 0.01 of the identity, as in the paper, in the unit of the mean variance of all channels and places:
    so it means the same whatever the length of features. State: shapes (sizes, 3), channels (K,), center (h, w, K),
    whitening (h, w, K, K).
    """

    positions = True

    @classmethod
    def fit(cls, read: Read, settings: ScorerSettings) -> Padim:
        """read: [(N, D, h, w), ...] of normal images only, one a size."""
        count = check_read(read, settings)
        shapes = [part.shape[1:] for part in read]
        channels = chosen_channels(sum(shape[0] for shape in shapes), settings)
        blank = cls(settings, shapes=torch.tensor(shapes), channels=channels)
        values = torch.empty(*finest(blank.shapes), count, len(channels))
        for start in range(0, count, 64):
            found = blank.features([torch.from_numpy(part[start : start + 64]) for part in read])
            values[:, :, start : start + 64] = found.permute(2, 3, 0, 1)
        center = values.mean(dim=2)
        unit = values.var(dim=2, correction=0).mean().double().clamp(min=1e-18)
        whitening = torch.empty(*center.shape, len(channels))
        identity = torch.eye(len(channels), dtype=torch.float64)
        for row in range(len(center)):
            apart = (values[row] - center[row, :, None]).double()
            covariance = apart.transpose(1, 2) @ apart / (count - 1) + SHRINKAGE * unit * identity
            lower = torch.linalg.cholesky(covariance)
            whitening[row] = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
        return cls(settings, shapes=blank.shapes, channels=channels, center=center, whitening=whitening)

    def features(self, read: list[torch.Tensor]) -> torch.Tensor:
        """The chosen channels (B, K, h, w)."""
        self.expect(read, [tuple(shape) for shape in self.shapes.tolist()])
        return self.scaled(stacked(read, finest(self.shapes))[:, self.channels])

    def maps(self, read: list[torch.Tensor]) -> torch.Tensor:
        apart = self.features(read).permute(2, 3, 0, 1) - self.center.unsqueeze(2)
        return (apart @ self.whitening.transpose(2, 3)).norm(dim=3).permute(2, 0, 1)

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        return self.maps(read).amax(dim=(1, 2))
