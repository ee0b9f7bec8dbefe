"""PaDiM: a Gaussian at every place of the feature maps (Defard et al., ICPR workshops 2021)."""

from __future__ import annotations

import torch

from carina.models.scorers.base import Read, Scorer, ScorerSettings, check_read, highest, parted
from carina.models.scorers.places import chosen_channels, finest, stacked, whitening


class Padim(Scorer):
    """A place's distance is Mahalanobis' to the normals' Gaussian there, over `dimensions` channels drawn at random; the
    score is the largest. Maps of several sizes are resized to the finest and stacked.

    State: shapes (sizes, 3), channels (K,), center (h, w, K), whitening (h, w, K, K).
    """

    positions = True

    @classmethod
    def fit(cls, read: Read, settings: ScorerSettings) -> Padim:
        """read: [(N, D, h, w), ...] of normal images only, one a size."""
        count = check_read(read, settings)
        read, _ = parted(read, settings)
        shapes = torch.tensor([part.shape[1:] for part in read])
        channels = chosen_channels(int(shapes[:, 0].sum()), settings)
        blank = cls(settings, shapes=shapes, channels=channels)
        values = torch.empty(*finest(shapes), count, len(channels))
        for start in range(0, count, 64):
            found = blank.features([torch.from_numpy(part[start : start + 64]) for part in read])
            values[:, :, start : start + 64] = found.permute(2, 3, 0, 1)
        center, matrices = whitening(values)
        return cls(settings, shapes=shapes, channels=channels, center=center, whitening=matrices)

    def features(self, read: list[torch.Tensor]) -> torch.Tensor:
        """The chosen channels (B, K, h, w) of maps."""
        self.expect(read, [tuple(shape) for shape in self.shapes.tolist()])
        return stacked(read, self.shapes)[:, self.channels]

    def maps(self, read: list[torch.Tensor]) -> torch.Tensor:
        apart = self.features(parted(read, self.settings)[0]).permute(2, 3, 0, 1) - self.center.unsqueeze(2)
        return (apart @ self.whitening.transpose(2, 3)).norm(dim=3).permute(2, 0, 1)

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        return highest(self.maps(read), parted(read, self.settings)[1], self.settings)
