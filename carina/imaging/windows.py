"""Windows on batches of images, and points in their lung masks."""

from __future__ import annotations

import numpy as np
import torch

from carina.draws import Draws


def column_of(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)[:, None, None]


def window_places(rows: torch.Tensor, starts: torch.Tensor, height: int, width: int, side: int) -> torch.Tensor:
    """(N, height, width) int64 places in the flattened batch, of windows that begin at `starts` (N, 2) in images `rows`;
    where a window leaves the image, the nearest pixel's."""
    down = (starts[:, 0, None] + torch.arange(height, device=rows.device)).clamp(0, side - 1)
    across = (starts[:, 1, None] + torch.arange(width, device=rows.device)).clamp(0, side - 1)
    return ((rows[:, None] * side + down) * side)[:, :, None] + across[:, None, :]


def read_places(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return images.view(-1).index_select(0, places.view(-1)).view(places.shape)


def row_counts(masks: torch.Tensor) -> torch.Tensor:
    """(B, S) int32: how many pixels of each row of masks (B, 1, S, S) bool are set."""
    side = masks.shape[-1]
    if side % 8 or side > 2040:
        return masks[:, 0].sum(dim=2, dtype=torch.int32)
    eights = masks[:, 0].contiguous().view(torch.int64).sum(dim=2)  # eight columns of counts below 256, a byte each
    return eights.view(torch.uint8).view(-1, side, 8).sum(dim=2, dtype=torch.int32)


def lung_points(
    masks: torch.Tensor, draws: Draws, counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A uniformly drawn pixel of each mask (B, 1, S, S) bool -> (row (B,), column (B,)); the center of an empty one.
    counts: what row_counts gives, where it is known already."""
    height, width = masks.shape[-2:]
    ends = (row_counts(masks) if counts is None else counts).cumsum(dim=1)
    total = ends[:, -1]
    unit = torch.from_numpy(draws.uniform("lung point").astype(np.float64)).to(masks.device)
    rank = torch.minimum((unit * total).floor().to(torch.int64), (total - 1).clamp(min=0))[:, None]
    row = torch.searchsorted(ends, rank, right=True).clamp(max=height - 1)
    before = torch.where(row > 0, ends.gather(1, (row - 1).clamp(min=0)), 0)
    line = masks[:, 0].gather(1, row[:, :, None].expand(-1, 1, width))[:, 0].to(torch.int32).cumsum(dim=1)
    column = torch.searchsorted(line, rank - before, right=True).clamp(max=width - 1)
    empty = total == 0
    return torch.where(empty, height // 2, row[:, 0]), torch.where(empty, width // 2, column[:, 0])


def lung_box(masks: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last row and column, (B, 2) each, of masks (B, 1, S, S) bool; the whole image for an empty one."""
    there = torch.stack([(counts > 0).view(torch.uint8), masks[:, 0].view(torch.uint8).amax(dim=1)], dim=1)
    return there.argmax(dim=2), there.shape[2] - 1 - there.flip(2).argmax(dim=2)


def within(unit: np.ndarray, size: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Centers of intervals of `size` (B, 2) that lie inside [first, last]; the middle where they do not fit."""
    room = last - first + 1 - size
    start = torch.from_numpy(unit.astype(np.float64)).to(size.device) * (room.clamp(min=0) + 1)
    center = first + start.floor().minimum(room.clamp(min=0)) + torch.where(room < 0, room // 2, 0)
    return (center + size // 2).to(torch.int64)


def centers(masks: torch.Tensor | None, images: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """A lung pixel of each image, or any pixel where there are no masks."""
    if masks is not None:
        return lung_points(masks, draws)
    side = images.shape[-1]
    at = torch.from_numpy(np.stack([draws.integers(f"center {axis}", 0, side) for axis in "yx"])).to(images.device)
    return at[0], at[1]
