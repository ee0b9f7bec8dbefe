"""A memory of patches of several sizes at their places (after Kim, Moon and Lee, Sci. Rep. 2023)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from carina.draws import permutation
from carina.models.scorers.base import Read, Scorer, ScorerSettings, check_read, highest, parted, pieces
from carina.models.scorers.places import chosen_channels, finest, resized, whitening

HELD_OUT = 256  # at most so many normals, and a quarter of them, tell the usual distance at every place
PRIOR = 8  # normals that the mean variance of all places counts for in the variance at each
PAIRS = 1 << 22  # distances that are held at a time, few enough for a CPU's cache


class Memory(Scorer):
    """A patch's distance is that to its nearest among the patches of normal images at the same place, or within `reach`
    of it, whitened by the covariance of normals there. Distances become z-scores at every place, for each size of patches
    and of images, by those of normals that are held out; the anomaly map is the largest over sizes, the score its maximum
    (`highest`). Holds patients' features.

    Patches are means over windows of the feature maps, one at every place, cut at the border: `patches` are their sides
    as fractions of the image's, rounded to odd numbers of places; equal ones count once. `dimensions` channels, drawn at
    random, are kept. Normals that are held out are left out of the covariance and of what their own distance is
    taken to, and are part of the memory afterwards.

    State: shapes (sizes, 3), channels (K,), and for the input size number s maps_s (h, w, N, K), center_s
    (windows, h, w, K), whitening_s (windows, h, w, K, K), mean_s and deviation_s (windows, h, w).
    """

    memory = True
    positions = True

    def __init__(self, settings: ScorerSettings, **tensors: torch.Tensor):
        super().__init__(settings, **tensors)
        self.lengths: dict[tuple[int, int], torch.Tensor] = {}  # by input size and window, made on first use

    @classmethod
    def fit(cls, read: Read, settings: ScorerSettings) -> Memory:
        """read: [(N, D, h, w), ...] of normal images only, one a size."""
        count = check_read(read, settings, least=4)
        read, _ = parted(read, settings)
        channels = chosen_channels(read[0].shape[1], settings)
        tensors = {"shapes": torch.tensor([part.shape[1:] for part in read]), "channels": channels}
        order = torch.from_numpy(permutation(count, "held out", settings.seed).copy())
        few = max(2, min(HELD_OUT, count // 4))
        for number, part in enumerate(read):
            maps = torch.empty(*part.shape[2:], count, len(channels))
            for rows in pieces(part):
                maps[:, :, rows] = torch.from_numpy(part[rows])[:, channels].permute(2, 3, 0, 1)
            scales = []
            for window in windows(part.shape[2:], settings):
                patches = means(maps, window)
                center, matrices = whitening(patches[:, :, order[few:]])
                shifts = within_reach(part.shape[2:], settings)
                lengths = bank_lengths(patches, center, matrices, shifts)
                own = nearest(patches[:, :, order[:few]], patches, center, matrices, shifts, lengths, order[:few])
                variance = own.var(dim=2)
                variance = ((few - 1) * variance + PRIOR * variance.mean()) / (few - 1 + PRIOR)
                scales.append((center, matrices, own.mean(dim=2), variance.clamp(min=1e-18).sqrt()))
            tensors[f"maps_{number}"] = maps
            for name, values in zip(("center", "whitening", "mean", "deviation"), zip(*scales)):
                tensors[f"{name}_{number}"] = torch.stack(values)
        return cls(settings, **tensors)

    def maps(self, read: list[torch.Tensor]) -> torch.Tensor:
        read, _ = parted(read, self.settings)
        self.expect(read, [tuple(shape) for shape in self.shapes.tolist()])
        found = []
        for number, part in enumerate(read):
            bank, maps = self.get_buffer(f"maps_{number}"), part[:, self.channels].permute(2, 3, 0, 1)
            names = ("center", "whitening", "mean", "deviation")
            scales = zip(*(self.get_buffer(f"{name}_{number}") for name in names))
            shifts = within_reach(part.shape[2:], self.settings)
            for window, (center, matrices, mean, deviation) in zip(windows(part.shape[2:], self.settings), scales):
                patches = means(bank, window)
                lengths = self.lengths.get((number, window))
                if lengths is None or lengths.device != bank.device:
                    lengths = self.lengths[number, window] = bank_lengths(patches, center, matrices, shifts)
                away = nearest(means(maps, window), patches, center, matrices, shifts, lengths)
                z = (away - mean[:, :, None]) / deviation[:, :, None]
                found.append(resized(z.permute(2, 0, 1)[:, None], finest(self.shapes))[:, 0])
        return torch.stack(found).amax(dim=0)  # a mean would thin out what one size alone sees

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        return highest(self.maps(read), parted(read, self.settings)[1], self.settings)


def windows(shape: tuple[int, ...], settings: ScorerSettings) -> list[int]:
    """Sides of the windows, in places of maps (h, w): odd, each once."""
    return sorted({2 * max(0, round((patch * max(shape) - 1) / 2)) + 1 for patch in settings.patches})


def means(maps: torch.Tensor, window: int) -> torch.Tensor:
    """Means of maps (h, w, N, K) over the window around every place, of that shape."""
    if window == 1:
        return maps
    flat = maps.flatten(2).permute(2, 0, 1).unsqueeze(0)
    pooled = F.avg_pool2d(flat, window, 1, window // 2, count_include_pad=False)
    return pooled[0].permute(1, 2, 0).reshape(maps.shape)


def within_reach(shape: tuple[int, ...], settings: ScorerSettings) -> list[tuple[int, int]]:
    """Places down and to the right, for maps (h, w), at which a patch may find its like."""
    reach = round(settings.reach * max(shape))
    return list(itertools.product(range(-reach, reach + 1), repeat=2))


def aligned(shape: tuple[int, ...], shifts: list[tuple[int, int]]) -> Iterator[tuple[int, int, int, slice, slice]]:
    """(number of the shift, row, the other row, columns, the other columns) of maps (h, w), row after row, so that what is
    computed for one stays in a CPU's cache."""
    height, width = shape[:2]
    for row, (number, (down, right)) in itertools.product(range(height), enumerate(shifts)):
        if 0 <= row + down < height:
            ours, theirs = slice(max(0, -right), width - max(0, right)), slice(max(0, right), width - max(0, -right))
            yield number, row, row + down, ours, theirs


def bank_lengths(
    bank: torch.Tensor, center: torch.Tensor, matrices: torch.Tensor, shifts: list[tuple[int, int]]
) -> torch.Tensor:
    """(shifts, h, w, N): squared distances of bank (h, w, N, K), moved by each shift, to the center in the metric of every
    place. They take as long as the distances to N queries, so a memory computes them once."""
    lengths = torch.zeros(len(shifts), *bank.shape[:3], device=bank.device)
    for number, row, other, ours, theirs in aligned(bank.shape, shifts):
        apart = (bank[other, theirs] - center[row, ours, None]) @ matrices[row, ours].transpose(1, 2)
        lengths[number, row, ours] = (apart**2).sum(dim=2)
    return lengths


def nearest(
    queries: torch.Tensor,
    bank: torch.Tensor,
    center: torch.Tensor,
    matrices: torch.Tensor,
    shifts: list[tuple[int, int]],
    lengths: torch.Tensor,
    leave: torch.Tensor | None = None,
) -> torch.Tensor:
    """Distances (h, w, B) of queries (h, w, B, K) to the nearest of bank (h, w, N, K) at the shifts from their place, in the
    metric of their place. lengths: those of `bank_lengths`. leave (B,): the one image of the bank that each query does not
    look at."""
    here = (queries - center[:, :, None]) @ matrices.transpose(2, 3)
    both = here @ matrices
    best = torch.full(here.shape[:3], torch.inf, device=here.device)
    step = max(1, PAIRS // (bank.shape[1] * bank.shape[2]))
    for number, row, other, ours, theirs in aligned(bank.shape, shifts):
        there = (bank[other, theirs] - center[row, ours, None]).transpose(1, 2)
        for start in range(0, here.shape[2], step):
            rows = slice(start, start + step)
            squares = torch.baddbmm(lengths[number, row, ours, None], both[row, ours, rows], there, alpha=-2)
            if leave is not None:
                squares[:, torch.arange(squares.shape[1]), leave[rows]] = torch.inf
            found = best[row, ours, rows]
            torch.minimum(found, squares.amin(dim=2), out=found)
    return (best + (here**2).sum(dim=3)).clamp(min=0).sqrt()
