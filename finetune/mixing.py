"""Mixed and cut training images: MixUp, CutMix, and Cut&Remain with the boxes of findings. Pure functions on batches, and
what draws their parameters.

An image that is a part of two has the labels of both by their shares, and a label that is unknown for one of them is
unknown. The share of an area is not the share of a lesion, and a size (the heart's) does not survive at all, which is
why mixing is off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from carina.data.labels import ABNORMAL
from carina.data.store import Selection
from carina.draws import Draws, hash64, sample_codes
from carina.errors import CarinaError

if TYPE_CHECKING:
    from carina.finetune.recipe import MixingSettings

# Findings that are a size, by the vocabulary of carina.data.labels
SIZES = (
    "Cardiomegaly",
    "Enlarged_Cardiomediastinum",
    "Mediastinal_Enlargement",
    "Enlarged_Pulmonary_Artery",
    "Aortic_Enlargement",
)
CHUNK = 1024  # lung masks that are read at a time
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, half-open
Mixed = tuple[torch.Tensor, torch.Tensor]  # images (B, 1, H, W), targets (B, L)


def mixup(images: torch.Tensor, targets: torch.Tensor, partners: torch.Tensor, share: float) -> Mixed:
    """Every image as the sum of itself and the share `share` of its partner (Zhang et al., ICLR 2018, arXiv 1710.09412).

    partners: (B,) rows of the batch.
    """
    return torch.lerp(images, images[partners], share), (1 - share) * targets + share * targets[partners]


def cutmix(images: torch.Tensor, targets: torch.Tensor, partners: torch.Tensor, box: Box) -> Mixed:
    """Every image with the box of its partner pasted in; labels are shared by exactly the area (Yun et al., ICCV 2019,
    arXiv 1905.04899)."""
    x0, y0, x1, y1 = box
    mixed = images.clone()
    mixed[..., y0:y1, x0:x1] = images[partners][..., y0:y1, x0:x1]
    share = (x1 - x0) * (y1 - y0) / (images.shape[-2] * images.shape[-1])
    return mixed, (1 - share) * targets + share * targets[partners]


def draw_box(height: int, width: int, share: float, generator: np.random.Generator) -> Box:
    """A box of the frame's shape and the share `share` of its area, around a pixel drawn at random, cut off at the edges."""
    sides = np.round(np.sqrt(share) * np.array([width, height])).astype(int)
    centers = np.array([generator.integers(width), generator.integers(height)])
    low = np.clip(centers - sides // 2, 0, [width, height])
    high = np.clip(centers - sides // 2 + sides, 0, [width, height])
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def mix(images: torch.Tensor, targets: torch.Tensor, settings: MixingSettings, key: Sequence[int]) -> Mixed:
    """MixUp or CutMix of a batch, or the batch as it is; all choices follow from `key`, the batch's own."""
    generator = np.random.Generator(np.random.Philox(key=hash64("mixing", *key)))
    if generator.random() >= settings.share:
        return images, targets
    share = float(generator.beta(settings.alpha, settings.alpha))
    partners = torch.from_numpy(generator.permutation(len(images))).to(images.device)
    if settings.name == "mixup":
        return mixup(images, targets, partners, share)
    return cutmix(images, targets, partners, draw_box(*images.shape[-2:], share, generator))


def remain(images: torch.Tensor, boxes: Sequence[np.ndarray | None]) -> torch.Tensor:
    """Images (B, 1, H, W) with everything outside the boxes black; None leaves an image as it is.

    boxes: for each image (K, 4) fractions of the frame, x0, y0, x1, y1; their edges are rounded to pixels.
    """
    height, width = images.shape[-2:]
    keep = torch.zeros(len(images), 1, height, width, dtype=torch.bool)
    for row, own in enumerate(boxes):
        if own is None:
            keep[row] = True
            continue
        corners = own * np.array([width, height, width, height])
        for x0, y0, x1, y1 in np.round(corners).astype(int):
            keep[row, :, max(y0, 0) : max(y1, y0 + 1, 0), max(x0, 0) : max(x1, x0 + 1, 0)] = True
    return images * keep.to(images.device)


class CutRemain:
    """Cut&Remain (Ryoo et al., 2021): of an image with boxes only the boxes stay, and the labels.

    Of its positive labels those remain known that one of its boxes shows, and `abnormal`. If that were all, black
    surroundings would say *finding*: so images without a finding are blanked by the boxes of others, as often among
    all of them as images with findings among all of those. Where the store has lung masks a box is carried over from
    the frame of the lungs of one image to that of the other, because a box that sits askew on the anatomy tells the same.
    """

    def __init__(self, selection: Selection, targets: np.ndarray, labels: Sequence[str], settings: MixingSettings):
        """selection, targets (N, L): all training rows."""
        self.labels, self.settings = list(labels), settings
        positive = np.nansum(targets == 1, axis=1) > 0
        codes = sample_codes(selection.table["image_id"].tolist())
        self.boxes: dict[int, tuple[np.ndarray, set[str]]] = {}
        for code, found, use in zip(codes.tolist(), selection.table["boxes"], positive):
            own = [] if found is None or not use else [box for box in found if self._counts(box["label"])]
            if own:
                corners = np.array([[box[side] for side in ("x0", "y0", "x1", "y1")] for box in own], dtype=np.float64)
                self.boxes[code] = corners, {box["label"] for box in own}
        if not self.boxes:
            raise CarinaError(
                "mixing.name=cut_remain keeps the boxes of findings, and no training row has a box of "
                f"{', '.join(self.labels)}; choose another mixing, or prepare the store with boxes"
            )
        codes = codes.tolist()
        self.frames = dict(zip(codes, lung_frames(selection)))
        self.pool = [_within(corners, self.frames[code]) for code, (corners, _) in self.boxes.items()]
        self.rate = settings.share * len(self.boxes) / positive.sum()

    def _counts(self, label: str) -> bool:
        return label in self.labels or ABNORMAL in self.labels

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, draws: Draws) -> Mixed:
        """images: (B, 1, S, S) as stored; what is drawn depends on the sample alone."""
        draws = draws.part("cut remain")
        chosen, others = draws.coin("chosen", self.settings.share), draws.coin("blanked", self.rate)
        whose = draws.integers("whose", 0, len(self.pool))
        known = targets.cpu().numpy()
        normal = (np.nan_to_num(known) == 0).all(axis=1) & (known == 0).any(axis=1)
        keep: list[np.ndarray | None] = [None] * len(images)
        hidden = torch.zeros(targets.shape, dtype=torch.bool)
        for row, code in enumerate(draws.codes.tolist()):
            if code in self.boxes and chosen[row]:
                keep[row], shown = self.boxes[code]
                hidden[row] = torch.tensor([label not in shown and label != ABNORMAL for label in self.labels])
            elif normal[row] and others[row] and self.settings.blank_negatives:
                keep[row] = _carried(self.pool[whose[row]], self.frames[code])
        hidden = hidden.to(targets.device) & (targets > 0)
        return remain(images, keep), targets.masked_fill(hidden, float("nan"))


def lung_frames(selection: Selection) -> np.ndarray:
    """(N, 4) x, y, width and height of the lungs' frame in fractions of the image's; all of the image without a mask."""
    frames = np.tile([0.0, 0.0, 1.0, 1.0], (len(selection), 1))
    if "lungs_source" not in selection.table:
        return frames
    known = np.flatnonzero((selection.table["lungs_source"] != "none").to_numpy())
    scale = min((scale for store in selection.stores for scale in store.scales), default=0)
    for rows in np.array_split(known, -(-len(known) // CHUNK)) if len(known) else ():
        lungs = selection.masks(rows.tolist(), scale)
        for row, mask in zip(rows, lungs):
            ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if len(xs):
                frames[row] = np.array([xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]) / scale
    return frames


def _within(corners: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Boxes (K, 4) of an image in fractions of a frame inside it."""
    return (corners - np.tile(frame[:2], 2)) / np.tile(frame[2:], 2)


def _carried(corners: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Boxes (K, 4) in fractions of a frame back in those of the image."""
    return corners * np.tile(frame[2:], 2) + np.tile(frame[:2], 2)


def size_notes(labels: Sequence[str], settings: MixingSettings) -> list[str]:
    """What a user should know of these labels under MixUp or CutMix."""
    sizes = [label for label in labels if label in SIZES]
    if settings.name not in ("mixup", "cutmix") or not sizes:
        return []
    return [f"mixing.name={settings.name}: {', '.join(sizes)} is a matter of size, which a mixed image does not show"]
