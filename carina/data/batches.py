"""Selection -> batches of tensors. Workers only read bytes; everything else runs batched in the main process.

The order of the corpus is a permutation drawn from (seed, epoch), and the batch of a step follows from the step alone:
a resumed run, or one with other workers or ranks, sees the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from carina.data.store import Selection, unit
from carina.draws import Draws, hash64, permutation, sample_codes
from carina.errors import CarinaError


@dataclass
class Batch:
    """What a task's loss is given.

    images: (B, 1, S, S) float32 in [0, 1]. others: alike, the second image of each positive pair: another one of the
    study or patient where `positives` asks for it and there is one, else the image itself. masks: (B, 1, S, S) bool, the
    lungs, or None. groups: name -> (B,) int64 codes of image, study and patient. targets: (B, L) float32, NaN where
    unknown, or None. draws: the samples' own random streams. key: changes with every micro-batch, for choices that
    concern the batch as a whole.
    """

    images: torch.Tensor
    masks: torch.Tensor | None
    groups: dict[str, torch.Tensor]
    targets: torch.Tensor | None
    draws: Draws
    scale: int
    key: tuple[int, ...]
    others: torch.Tensor | None = None

    def __post_init__(self):
        if self.others is None:
            self.others = self.images


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The corpus in the order of one epoch; kept, because a million images take a while to shuffle."""
    return permutation(count, seed, "order", epoch)


class _Reader(Dataset):
    def __init__(self, selection: Selection, plan: Plan, masks: bool):
        self.selection, self.plan, self.masks = selection, plan, masks

    def __getitem__(self, number: int):
        rows, scale = self.plan.rows(number), self.plan.scale(number)
        images = torch.from_numpy(self.selection.images(rows, scale))
        masks = torch.from_numpy(self.selection.masks(rows, scale)) if self.masks else torch.zeros(0)
        return images, masks

    def __len__(self) -> int:
        return self.plan.steps * self.plan.accumulate


@dataclass(frozen=True)
class Plan:
    """Which rows every micro-batch of every step holds.

    batch_size counts the images of one optimizer step over all ranks and micro-batches; it is cut into `accumulate`
    micro-batches, and each of those into `world` equal parts.
    """

    count: int
    batch_size: int
    accumulate: int
    world: int
    rank: int
    scales: tuple[int, ...]
    seed: int
    steps: int

    def __post_init__(self):
        if self.batch_size > self.count:
            raise CarinaError(
                f"batch_size={self.batch_size} is more than the {self.count} images there are; give at most {self.count}"
            )
        if self.batch_size % (self.accumulate * self.world):
            raise CarinaError(
                f"batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} x {self.world} equal "
                f"parts; give a multiple of {self.accumulate * self.world}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    @property
    def micro_batch(self) -> int:
        return self.batch_size // (self.accumulate * self.world)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def scale(self, number: int) -> int:
        return self.scales[(number // self.accumulate) % len(self.scales)]

    def rows(self, number: int) -> np.ndarray:
        """Positions of the rows of micro-batch `number` (counted over all steps) on this rank."""
        step, micro = divmod(number, self.accumulate)
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.count, self.seed, epoch)
        start = place * self.batch_size + (micro * self.world + self.rank) * self.micro_batch
        return order[start : start + self.micro_batch]


class Batches:
    """Iterates over (step, [micro-batches]) from a step on; `wait` is the share of time spent waiting for data."""

    def __init__(
        self,
        selection: Selection,
        plan: Plan,
        *,
        device: torch.device,
        workers: int = 0,
        masks: bool = False,
        targets: np.ndarray | None = None,
    ):
        self.selection, self.plan, self.device, self.workers = selection, plan, device, workers
        self.with_masks = masks
        self.targets = None if targets is None else torch.from_numpy(np.asarray(targets, dtype=np.float32))
        self.codes = sample_codes(selection.table["image_id"].tolist())
        self.groups = {"image": torch.from_numpy(self.codes.astype(np.int64))}
        for name in ("study", "patient"):
            values = selection.table[f"{name}_id"].tolist()
            codes = {value: hash64(value) >> 1 for value in set(values)}
            self.groups[name] = torch.tensor([codes[value] for value in values], dtype=torch.int64)
        self.waited = 0.0

    def _batch(self, number: int, images: torch.Tensor, masks: torch.Tensor) -> Batch:
        rows = self.plan.rows(number)
        step = number // self.plan.accumulate
        to = {"device": self.device, "non_blocking": True}
        return Batch(
            images=unit_tensor(images.to(**to)),
            masks=masks.to(**to).unsqueeze(1) if self.with_masks else None,
            groups={name: codes[rows].to(**to) for name, codes in self.groups.items()},
            targets=None if self.targets is None else self.targets[rows].to(**to),
            draws=Draws(self.plan.seed, self.plan.epoch(step), self.codes[rows]),
            scale=self.plan.scale(number),
            key=(self.plan.seed, number, self.plan.rank),
        )

    def from_step(self, first: int) -> Iterator[tuple[int, list[Batch]]]:
        reader = _Reader(self.selection, self.plan, self.with_masks)
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=range(first * self.plan.accumulate, len(reader)),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.workers else None,
        )
        pieces = iter(loader)
        for step in range(first, self.plan.steps):
            began = time.perf_counter()
            read = [next(pieces) for _ in range(self.plan.accumulate)]
            self.waited += time.perf_counter() - began
            numbers = range(step * self.plan.accumulate, (step + 1) * self.plan.accumulate)
            yield step, [self._batch(number, *piece) for number, piece in zip(numbers, read)]


def unit_tensor(images: torch.Tensor) -> torch.Tensor:
    """Stored pixels (B, S, S), uint8 or uint16 -> (B, 1, S, S) float32 in [0, 1]."""
    return images.unsqueeze(1).float().div_(torch.iinfo(images.dtype).max)


def in_order(
    selection: Selection, scale: int, device: torch.device, batch_size: int = 128
) -> Iterator[tuple[slice, torch.Tensor]]:
    """All rows in order: (slice, images (B, 1, S, S) float32 in [0, 1])."""
    for start in range(0, len(selection), batch_size):
        rows = range(start, min(start + batch_size, len(selection)))
        yield slice(rows.start, rows.stop), unit_tensor(torch.from_numpy(selection.images(rows, scale)).to(device))


def intensity(selection: Selection, scale: int, sample: int = 512) -> tuple[tuple[float], tuple[float]]:
    """Mean and standard deviation of the pixels of up to `sample` images, rounded to four digits."""
    rows: Sequence[int] = permutation(len(selection), "intensity")[:sample]
    pixels = unit(selection.images(np.sort(rows), scale)).astype(np.float64)
    return (round(float(pixels.mean()), 4),), (max(round(float(pixels.std()), 4), 1e-2),)
