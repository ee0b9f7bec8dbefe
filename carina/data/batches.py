"""Selection -> batches of tensors. Workers only read bytes; everything else runs batched in the main process.

The order of the corpus is a permutation drawn from (seed, epoch), and the batch of a step follows from the step alone:
a resumed run, or one with other workers or ranks, sees the same batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from carina.data.store import Selection, unit
from carina.draws import Draws, hash64, permutation, sample_codes
from carina.errors import CarinaError
from carina.models.controls import CHUNK, Rows
from carina.progress import Progress

PATIENCE = 300.0  # seconds until a batch that has not arrived is given up
NAMED = 3  # image_ids of a batch that a message names
UNREADABLE = (CarinaError, OSError, ValueError, LookupError, pa.ArrowException)  # what a damaged shard raises
ScalePlan = Literal["mixed", "growing"]
Group = Literal["image", "study", "patient"]


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


@dataclass(frozen=True)
class Plan:
    """Which rows every micro-batch of every step holds, and at which scale.

    batch_size counts the images of one optimizer step over all ranks and micro-batches; it is cut into `accumulate`
    micro-batches, and each of those into `world` equal parts. scale_plan: `mixed` takes the scales in turn, a step
    each; `growing` one after the other, each for its share of the steps (`shares`, of any sum; default equal).
    """

    count: int
    batch_size: int
    accumulate: int
    world: int
    rank: int
    scales: tuple[int, ...]
    seed: int
    steps: int
    scale_plan: ScalePlan = "mixed"

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
        if self.scale_plan == "growing" and len(set((0, *self.ends))) <= len(self.scales):
            raise CarinaError(
                f"{self.steps} steps are too few for scales {list(self.scales)} one after the other; give more steps or "
                "fewer scales"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    @property
    def micro_batch(self) -> int:
        return self.batch_size // (self.accumulate * self.world)

    @property
    def ends(self) -> tuple[int, ...]:
        """The step before which each scale of a growing plan ends."""
        count = len(self.scales)
        return tuple(round(self.steps * (place + 1) / count) for place in range(count))

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def scale(self, number: int) -> int:
        step = number // self.accumulate
        if self.scale_plan == "growing":
            return self.scales[int(np.searchsorted(self.ends, step, side="right"))]
        return self.scales[step % len(self.scales)]

    def rows(self, number: int) -> np.ndarray:
        """Positions of the rows of micro-batch `number` (counted over all steps) on this rank."""
        step, micro = divmod(number, self.accumulate)
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.count, self.seed, epoch)
        start = place * self.batch_size + (micro * self.world + self.rank) * self.micro_batch
        return order[start : start + self.micro_batch]


class Partners:
    """Draws another image of the same group (study or patient) for every image, from (seed, epoch, image_id) alone."""

    def __init__(self, groups: np.ndarray, codes: np.ndarray):
        """groups: (N,) int64 codes of the rows' groups. codes: (N,) uint64 from `sample_codes`."""
        self.codes = codes
        self.order = np.lexsort((codes, groups))  # the rows of a group stand together, in an order of their own
        _, first, group, size = np.unique(
            groups[self.order], return_index=True, return_inverse=True, return_counts=True
        )
        self.first, self.size, self.place = (np.empty(len(groups), dtype=np.int64) for _ in range(3))
        self.first[self.order], self.size[self.order] = first[group], size[group]
        self.place[self.order] = np.arange(len(groups)) - first[group]

    def __call__(self, rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """(B,) rows: the partner of each of `rows`, itself when it is alone."""
        first, size, place = self.first[rows], self.size[rows], self.place[rows]
        unit_draw = Draws(seed, epoch, self.codes[rows]).uniform("partner").astype(np.float64)
        ahead = 1 + np.floor(unit_draw * (size - 1)).astype(np.int64)  # 1 to size - 1, or 1 when alone
        return self.order[first + (place + ahead) % size]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Reader(Dataset):
    """Micro-batch number -> stored pixels (`images` and, with partners, `others`), masks, or what went wrong."""

    def __init__(self, selection: Selection, plan: Plan, masks: bool, partners: Partners | None):
        self.selection, self.plan, self.masks, self.partners = selection, plan, masks, partners

    def __len__(self) -> int:
        return self.plan.steps * self.plan.accumulate

    def __getitem__(self, number: int) -> dict[str, torch.Tensor | str]:
        rows, scale = self.plan.rows(number), self.plan.scale(number)
        chosen = rows
        if self.partners is not None:
            chosen = self.partners(rows, self.plan.seed, self.plan.epoch(number // self.plan.accumulate))
        apart = np.flatnonzero(chosen != rows)
        wanted = np.concatenate([rows, chosen[apart]])
        try:
            pixels = torch.from_numpy(self.selection.images(wanted, scale))
            read = {"images": pixels[: len(rows)]}
            if self.masks:
                read["masks"] = torch.from_numpy(self.selection.masks(rows, scale))
        except UNREADABLE as error:  # told as a value: an error that crosses processes would carry their traceback
            return {"fault": self._fault(wanted, scale, error)}
        if self.partners is not None:
            read["others"] = read["images"].clone()
            read["others"][apart] = pixels[len(rows) :]
        return read

    def _fault(self, rows: np.ndarray, scale: int, error: Exception) -> str:
        """One sentence that names the first row that cannot be read."""
        found = int(rows[0])
        for row in rows.tolist():
            try:
                self.selection.images([row], scale)
                if self.masks:
                    self.selection.masks([row], scale)
            except UNREADABLE as own:
                found, error = row, own
                break
        name = self.selection.table["image_id"].iloc[found]
        return f"image {name} cannot be read at scale {scale} ({_first_line(error)}); check the disk, or prepare again"


class Batches:
    """Iterates over (step, [micro-batches]) from a step on; `waited` counts the seconds spent waiting for data.

    positives: what an image's partner in `Batch.others` shares with it; `image` is the image itself. patience: seconds
    until a batch that the workers do not deliver is given up (default: CARINA_LOADER_PATIENCE, or 300).
    """

    def __init__(
        self,
        selection: Selection,
        plan: Plan,
        *,
        device: torch.device,
        workers: int = 0,
        masks: bool = False,
        targets: np.ndarray | None = None,
        positives: Group = "image",
        patience: float | None = None,
    ):
        self.selection, self.plan, self.device, self.workers = selection, plan, device, workers
        self.with_masks = masks
        self.patience = _patience() if patience is None else patience
        self.targets = None if targets is None else torch.from_numpy(np.array(targets, dtype=np.float32))
        self.codes = sample_codes(selection.table["image_id"].tolist())
        self.groups = {"image": torch.from_numpy(self.codes.astype(np.int64))}
        for name in ("study", "patient"):
            values = selection.table[f"{name}_id"].tolist()
            codes = {value: hash64(value) >> 1 for value in set(values)}
            self.groups[name] = torch.tensor([codes[value] for value in values], dtype=torch.int64)
        self.partners = None if positives == "image" else Partners(self.groups[positives].numpy(), self.codes)
        self.waited = 0.0

    def _batch(self, number: int, read: dict[str, torch.Tensor]) -> Batch:
        rows = self.plan.rows(number)
        step = number // self.plan.accumulate
        to = {"device": self.device, "non_blocking": True}
        return Batch(
            images=unit_tensor(read["images"].to(**to)),
            masks=read["masks"].to(**to).unsqueeze(1) if self.with_masks else None,
            groups={name: codes[rows].to(**to) for name, codes in self.groups.items()},
            targets=None if self.targets is None else self.targets[rows].to(**to),
            draws=Draws(self.plan.seed, self.plan.epoch(step), self.codes[rows]),
            scale=self.plan.scale(number),
            key=(self.plan.seed, number, self.plan.rank),
            others=unit_tensor(read["others"].to(**to)) if "others" in read else None,
        )

    def from_step(self, first: int) -> Iterator[tuple[int, list[Batch]]]:
        reader = _Reader(self.selection, self.plan, self.with_masks, self.partners)
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=range(first * self.plan.accumulate, len(reader)),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.workers else None,
            timeout=self.patience if self.workers else 0,
        )
        pieces = iter(loader)
        for step in range(first, self.plan.steps):
            numbers = range(step * self.plan.accumulate, (step + 1) * self.plan.accumulate)
            began = time.perf_counter()
            read = [self._next(pieces, number) for number in numbers]
            self.waited += time.perf_counter() - began
            yield step, [self._batch(number, piece) for number, piece in zip(numbers, read)]

    def _next(self, pieces: Iterator[dict[str, torch.Tensor | str]], number: int) -> dict[str, torch.Tensor]:
        """The next micro-batch, which is `number`; what keeps it from coming is told with its image_ids."""
        began = time.perf_counter()
        try:
            read = next(pieces)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):  # torch's own words; the rest are faults of the reader
                raise
            names = self.selection.table["image_id"].iloc[self.plan.rows(number)[:NAMED]]
            batch = f"the batch of image_ids {', '.join(names)}, ... at scale {self.plan.scale(number)}"
            if time.perf_counter() - began >= self.patience:
                raise CarinaError(
                    f"{batch} did not arrive within {self.patience:g} s; check the disk that holds the store, or give "
                    "CARINA_LOADER_PATIENCE more seconds"
                ) from None
            raise CarinaError(
                f"a worker ended while {batch} was awaited ({_first_line(error)}); lower workers, memory may be short"
            ) from None
        if "fault" in read:
            raise CarinaError(read["fault"])
        return read


def _patience() -> float:
    text = os.environ.get("CARINA_LOADER_PATIENCE", str(PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise CarinaError(f"CARINA_LOADER_PATIENCE={text} is no number of seconds above 0; give one, as in 300")
    return seconds


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


def with_lungs(
    selection: Selection, scale: int, device: torch.device, wanted: bool = True
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """As `in_order`, with the lungs (B, 1, S, S) bool where they are wanted. Raises CarinaError where a row has none."""
    if wanted:
        selection.check_lungs()
    for rows, images in in_order(selection, scale, device):
        lungs = None
        if wanted:
            lungs = torch.from_numpy(selection.masks(range(rows.start, rows.stop), scale)).unsqueeze(1).to(device)
        yield rows, images, lungs


def control_chunks(selection: Selection, scale: int, quiet: bool = True) -> Iterator[Rows]:
    """All rows in order as the control rows take them; lungs where the store has any."""
    sizes, lungs = selection.table[["height", "width"]].to_numpy(), (selection.table["lungs_source"] != "none").any()
    with Progress("control rows", len(selection), unit="images", quiet=quiet) as progress:
        for start in range(0, len(selection), CHUNK):
            places = range(start, min(start + CHUNK, len(selection)))
            masks = selection.masks(places, scale) if lungs else None
            yield Rows(selection.images(places, scale), masks, sizes[places.start : places.stop])
            progress.advance(len(places))


def intensity(selection: Selection, scale: int, sample: int = 512) -> tuple[tuple[float], tuple[float]]:
    """Mean and standard deviation of the pixels of up to `sample` images, rounded to four digits."""
    rows: Sequence[int] = permutation(len(selection), "intensity")[:sample]
    pixels = unit(selection.images(np.sort(rows), scale)).astype(np.float64)
    return (round(float(pixels.mean()), 4),), (max(round(float(pixels.std()), 4), 1e-2),)
