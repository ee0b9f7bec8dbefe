"""PatchCore: a coreset of the patches of normal images (Roth et al., CVPR 2022)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from carina.draws import hash64, permutation
from carina.models.scorers.base import Read, Scorer, ScorerSettings, check_read, parted
from carina.models.scorers.places import finest, stacked

PATCHES = 30_000  # drawn among all before the coreset is chosen, so that thousands of images fit
PROJECTED = 128  # dimensions in which the coreset is chosen
PAIRS = 1 << 24  # distances that are held at a time


class PatchCore(Scorer):
    """A patch's distance is that to its nearest in the memory, from any place. The score is the largest distance, times
    the paper's weight: small where the nearest patch is itself close to its `neighbors` nearest in the memory.

    Patches are means over 3 x 3 places. Maps of several sizes are resized to the finest and stacked. Holds patients'
    features. State: shapes (sizes, 3), bank (M, D), the greedy k-center of `coreset` of at most 30,000 patches.
    """

    memory = True
    positions = True

    @classmethod
    def fit(cls, read: Read, settings: ScorerSettings) -> PatchCore:
        """read: [(N, D, h, w), ...] of normal images only, one a size."""
        count = check_read(read, settings, least=1)
        read, _ = parted(read, settings)
        blank = cls(settings, shapes=torch.tensor([part.shape[1:] for part in read]))
        height, width = finest(blank.shapes)
        drawn = np.sort(permutation(count * height * width, "patches", settings.seed)[:PATCHES])
        found = []
        for start in range(0, count, 64):
            patches = blank.patches([torch.from_numpy(part[start : start + 64]) for part in read]).flatten(0, 2)
            first = start * height * width
            here = drawn[(drawn >= first) & (drawn < first + len(patches))] - first
            found.append(patches[torch.from_numpy(here)])
        patches = torch.cat(found)
        kept = greedy_coreset(patches, max(1, round(settings.coreset * len(patches))), settings.seed)
        return cls(settings, shapes=blank.shapes, bank=patches[kept])

    def patches(self, read: list[torch.Tensor]) -> torch.Tensor:
        """(B, h, w, D) of maps."""
        self.expect(read, [tuple(shape) for shape in self.shapes.tolist()])
        maps = stacked(read, self.shapes)
        return self.scaled(F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)).permute(0, 2, 3, 1)

    def nearest(self, patches: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and numbers (..., count) of the nearest in the memory, nearest first."""
        lengths, flat = (self.bank**2).sum(dim=1), patches.reshape(-1, patches.shape[-1])
        rows = [
            (lengths - 2 * part @ self.bank.T).topk(count, largest=False).indices
            for part in flat.split(max(1, PAIRS // len(self.bank)))
        ]
        found = torch.cat(rows)
        away = torch.cat([(flat - self.bank[column]).norm(dim=1, keepdim=True) for column in found.T], dim=1)
        return away.reshape(*patches.shape[:-1], count), found.reshape(*patches.shape[:-1], count)

    def maps(self, read: list[torch.Tensor]) -> torch.Tensor:
        return self.nearest(self.patches(parted(read, self.settings)[0]), 1)[0][..., 0]

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        read, places = parted(read, self.settings)
        patches = self.patches(read)
        away, found = (part.flatten(1) for part in self.nearest(patches, 1))
        judged = away if places is None else away.masked_fill(~places.flatten(1), -torch.inf)
        rows, worst = torch.arange(len(patches), device=patches.device), judged.argmax(dim=1)
        score, patch = away[rows, worst], patches.flatten(1, 2)[rows, worst]
        if (count := min(self.settings.neighbors, len(self.bank))) < 2:
            return score
        near = self.bank[self.nearest(self.bank[found[rows, worst]], count)[1]]
        # the paper divides e^score by the sum over all neighbors; the first of them is the nearest patch itself
        return score * (1 - torch.softmax((patch[:, None] - near).norm(dim=2), dim=1)[:, 0])


def greedy_coreset(values: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Numbers (count,) of rows (N, D), each the farthest from those before it (Gonzalez 1985), the first one drawn.

    More than 128 dimensions are projected at random to 128, which keeps distances well enough to choose by (Johnson and
    Lindenstrauss 1984).
    """
    if values.shape[1] > PROJECTED:
        drawn = np.random.default_rng(hash64("coreset projection", seed)).normal(size=(values.shape[1], PROJECTED))
        values = values @ torch.from_numpy(drawn / PROJECTED**0.5).to(values)
    lengths = (values**2).sum(dim=1)
    kept = torch.empty(count, dtype=torch.int64)
    nearest = torch.full((len(values),), torch.inf, dtype=values.dtype, device=values.device)
    latest = hash64("coreset", seed) % len(values)
    for number in range(count):
        kept[number] = latest
        nearest = torch.minimum(nearest, lengths + lengths[latest] - values @ (2 * values[latest]))
        nearest[latest] = -torch.inf
        latest = int(nearest.argmax())
    return kept
