"""A memory of patches of several sizes at their places (Kim, Moon and Lee, Sci. Rep. 2023)."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from carina.draws import permutation
from carina.models.scorers.base import Read, Scorer, ScorerSettings, check_read, pieces

HELD_OUT = 256  # normals whose distances to the others give the scale of each size of patches
PAIRS = 1 << 24  # distances that are held at a time


class Memory(Scorer):
    """A patch's distance is that to its nearest among the patches of normal images at the same place, or within `reach`
    of it. Distances become z-scores for every size of patches and every size of images, by what normals show that are
    left out; the anomaly map is their mean, the score its maximum. Holds patients' features.

    Patches are means over windows of the feature maps, one at every place, cut at the border: `patches` are their sides
    as fractions of the image's, rounded to odd numbers of places; equal ones count once. `dimensions` channels, drawn at
    random, are kept. State, for the input size number s: maps_s (h, w, N, D), scale_s (windows, 2), mean and deviation;
    channels (D,); shapes (sizes, 3).
    """

    memory = True
    positions = True

    @classmethod
    def fit(cls, read: Read, settings: ScorerSettings) -> Memory:
        """read: [(N, D, h, w), ...] of normal images only, one a size."""
        count = check_read(read, settings, least=3)
        tensors = {"shapes": torch.tensor([part.shape[1:] for part in read])}
        tensors["channels"] = chosen_channels(read[0].shape[1], settings)
        for number, part in enumerate(read):
            maps = torch.empty(*part.shape[2:], count, len(tensors["channels"]))
            for rows in pieces(part):
                maps[:, :, rows] = torch.from_numpy(part[rows])[:, tensors["channels"]].permute(2, 3, 0, 1)
            tensors[f"maps_{number}"] = maps
        few = torch.from_numpy(permutation(count, "held out", settings.seed)[:HELD_OUT].copy())
        scorer = cls(settings, **tensors)
        for number in range(len(read)):
            left_out = scorer.get_buffer(f"maps_{number}")[:, :, few]
            own = [scorer.nearest(number, window, left_out, leave=few) for window in scorer.windows(number)]
            scale = [torch.stack([found.mean(), found.std().clamp(min=1e-12)]) for found in own]
            scorer.register_buffer(f"scale_{number}", torch.stack(scale))
        return scorer

    def windows(self, number: int) -> list[int]:
        """Sides in places of this size's maps, odd, each once."""
        side = max(self.shapes[number, 1:].tolist())
        return sorted({2 * max(0, round((patch * side - 1) / 2)) + 1 for patch in self.settings.patches})

    def nearest(self, number: int, window: int, maps: torch.Tensor, leave: torch.Tensor | None = None) -> torch.Tensor:
        """Distances (B, h, w) of the patches of maps (h, w, B, D); `leave` (B,): the normal that each image is."""
        bank, queries = self.patches(self.get_buffer(f"maps_{number}"), window), self.patches(maps, window)
        step = max(1, PAIRS // (bank.shape[0] * bank.shape[1] * bank.shape[2]))
        height, width = bank.shape[:2]
        reach = round(self.settings.reach * max(height, width))
        lengths = (bank**2).sum(dim=3).unsqueeze(2)
        result = []
        for start in range(0, queries.shape[2], step):
            part = queries[:, :, start : start + step]
            best = torch.full(part.shape[:3], torch.inf, device=part.device)
            for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
                ours = (slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right)))
                theirs = (slice(max(0, down), height - max(0, -down)), slice(max(0, right), width - max(0, -right)))
                squares = lengths[theirs] - 2 * part[ours] @ bank[theirs].transpose(2, 3)
                if leave is not None:
                    rows = torch.arange(squares.shape[2], device=squares.device)
                    squares[:, :, rows, leave[start : start + step]] = torch.inf
                best[ours] = torch.minimum(best[ours], squares.amin(dim=3))
            result.append((best + (part**2).sum(dim=3)).clamp(min=0).sqrt())
        return torch.cat(result, dim=2).permute(2, 0, 1)

    def patches(self, maps: torch.Tensor, window: int) -> torch.Tensor:
        """Means (h, w, N, D) over windows around every place, to unit length where `normalize` says so."""
        height, width, count, channels = maps.shape
        flat = maps.reshape(1, height, width, -1).permute(0, 3, 1, 2)
        if window > 1:
            flat = F.avg_pool2d(flat, window, 1, window // 2, count_include_pad=False)
        maps = flat.permute(0, 2, 3, 1).reshape(height, width, count, channels)
        return F.normalize(maps, dim=3, eps=1e-12) if self.settings.normalize else maps

    def maps(self, read: list[torch.Tensor]) -> torch.Tensor:
        self.expect(read, [tuple(shape) for shape in self.shapes.tolist()])
        side = tuple(self.shapes[:, 1:].amax(dim=0).tolist())
        total, parts = 0.0, 0
        for number, part in enumerate(read):
            maps = part[:, self.channels].permute(2, 3, 0, 1)
            for window, (mean, deviation) in zip(self.windows(number), self.get_buffer(f"scale_{number}")):
                found = (self.nearest(number, window, maps) - mean) / deviation
                total = total + F.interpolate(found[:, None], side, mode="bilinear", align_corners=False)[:, 0]
                parts += 1
        return total / parts

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        return self.maps(read).amax(dim=(1, 2))


def chosen_channels(count: int, settings: ScorerSettings) -> torch.Tensor:
    """`dimensions` of the channels (K,), drawn by the seed; all of them where there are no more."""
    kept = min(count, settings.dimensions or count)
    return torch.from_numpy(np.sort(permutation(count, "channels", settings.seed)[:kept]))
