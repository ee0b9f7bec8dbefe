"""Control rows: features of radiographs that know nothing of lungs or lesions, scored as a backbone's are.

A method earns its name where it beats these rows on the same images. Arrays in, arrays out: whoever calls reads the
store, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import cv2
import numpy as np
import torch

from carina.errors import CarinaError, nearest
from carina.models.backbones import Backbone, random_backbone
from carina.models.scorers import SCORERS, ScorerSettings
from carina.recipes import read_recipe, validate

CHUNK = 256  # images that a caller gives at a time

HOG_SIDE, HOG_CELL, HOG_BLOCK, HOG_BINS = 128, 16, 2, 9
HOG_CLIP, HOG_EPSILON = 0.2, 1e-5
PIXEL_SIDE = 32
RING_SIDE, RING_WIDTH = 40, 4  # the outermost 10 % of the side
PERCENTILES = (5, 25, 50, 75, 95)
LARGEST = 224  # side at which images enter a random network, at most: its controls need no more
SCALE = 128  # the smallest scale of a store from here on is what control rows see: they do not gain from more
LUNGS_ONLY, BACKGROUND_ONLY = "HOG, lungs only", "HOG, background only"


@dataclass(frozen=True)
class Rows:
    """A chunk of radiographs. images: (B, S, S) uint8 or uint16. lungs: (B, S, S) bool, None where nobody made masks.
    sizes: (B, 2) height and width of the files."""

    images: np.ndarray
    lungs: np.ndarray | None
    sizes: np.ndarray

    @cached_property
    def small(self) -> np.ndarray:
        """(B, 128, 128) float32 in [0, 1]: what HOG sees."""
        return resized(self.images, HOG_SIDE)

    @cached_property
    def outlines(self) -> np.ndarray:
        """(B, 128, 128) float32, 1 in the lungs and 0 outside."""
        return (resized(self.lungs, HOG_SIDE) >= 0.5).astype(np.float32)


def control_scale(scales: Iterable[int]) -> int:
    """The scale of a store that control rows see."""
    return min((scale for scale in scales if scale >= SCALE), default=max(scales))


@cache
def default_settings() -> ScorerSettings:
    """Those of the shipped recipe, whatever the run beside these rows was given."""
    return validate(ScorerSettings, read_recipe("finetune", "anomaly")["scorer"], "scorer of the control rows")


@dataclass(frozen=True)
class Method:
    """A scorer and what is done to features before it: standard (mean 0, deviation 1 among the normals that are fitted)
    where their units differ, unit (length 1, the recipe's default) for networks."""

    scorer: Literal["gaussian", "knn"]
    before: Literal["nothing", "standard", "unit"] = "nothing"

    def __str__(self) -> str:
        return self.scorer + {"nothing": "", "standard": ", standardized", "unit": ", unit length"}[self.before]

    def distances(self, normals: np.ndarray, scored: np.ndarray) -> np.ndarray:
        """Distances (n,) of `scored` (n, D) by a scorer fitted on `normals` (N, D); higher is worse."""
        if self.before == "standard":
            center, spread = normals.mean(axis=0, dtype=np.float64), normals.std(axis=0, dtype=np.float64)
            spread = np.where(spread > 0, spread, 1.0)
            normals, scored = (normals - center) / spread, (scored - center) / spread
        settings = default_settings().model_copy(update={"name": self.scorer, "normalize": self.before == "unit"})
        scorer = SCORERS[self.scorer].fit([normals.astype(np.float32)], settings)
        with torch.no_grad():
            return scorer([torch.from_numpy(scored.astype(np.float32))]).double().numpy()


@dataclass(frozen=True)
class Control:
    """Features that know nothing of disease. `describe` makes them, (B, D), of a chunk; `methods` are those of anomaly
    detection, one row of the table each; `lungs`: lung masks are needed."""

    name: str
    describe: Callable[[Rows], np.ndarray]
    methods: tuple[Method, ...] = (Method("gaussian"),)
    lungs: bool = False


@dataclass(frozen=True)
class ControlRow:
    """A row of the table: scores (n,), higher is worse; or None, and `missing` says why there are none."""

    control: str
    method: str
    dimension: int
    scores: np.ndarray | None
    missing: str = ""


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """(B, S, S) uint8, uint16 or bool -> (B, side, side) float32 in [0, 1], area filter; bilinear where it enlarges."""
    scale = np.float32(1 if images.dtype == bool else np.iinfo(images.dtype).max)
    how = cv2.INTER_LINEAR if side > images.shape[-1] else cv2.INTER_AREA
    return np.stack([cv2.resize(image.astype(np.float32), (side, side), interpolation=how) for image in images]) / scale


def hog(images: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients (Dalal and Triggs, CVPR 2005) of images (B, 128, 128): (B, 7 * 7 * 36).

    Central differences, 0 at the border; 9 unsigned orientations, a gradient shared linearly between the two nearest;
    cells of 16 pixels without overlap or smoothing; blocks of 2 x 2 cells at every cell, L2-Hys with clip 0.2.
    """
    images = images.astype(np.float32)
    rows, columns = np.zeros_like(images), np.zeros_like(images)
    rows[:, 1:-1] = images[:, 2:] - images[:, :-2]
    columns[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
    strength = np.hypot(rows, columns)
    place = np.mod(np.arctan2(rows, columns) / np.pi, 1.0) * HOG_BINS
    count, cells = len(images), HOG_SIDE // HOG_CELL
    histogram = np.empty((count, cells, cells, HOG_BINS), dtype=np.float32)
    for orientation in range(HOG_BINS):
        away = np.abs(place - (orientation + 0.5))
        share = np.maximum(1 - np.minimum(away, HOG_BINS - away), 0) * strength
        histogram[..., orientation] = share.reshape(count, cells, HOG_CELL, cells, HOG_CELL).sum(axis=(2, 4))
    blocks = np.lib.stride_tricks.sliding_window_view(histogram, (HOG_BLOCK, HOG_BLOCK), axis=(1, 2))
    blocks = blocks.reshape(count, *blocks.shape[1:3], -1)
    blocks = np.minimum(_unit(blocks), HOG_CLIP)
    return _unit(blocks).reshape(count, -1)


def _unit(blocks: np.ndarray) -> np.ndarray:
    return blocks / np.sqrt((blocks**2).sum(axis=-1, keepdims=True) + HOG_EPSILON**2)


def _border(side: int, width: int) -> np.ndarray:
    inner = np.ones((side, side), dtype=bool)
    inner[width:-width, width:-width] = False
    return inner


def statistics(rows: Rows) -> np.ndarray:
    """(B, 9): mean, standard deviation, least, greatest, and five percentiles of an image's pixels in [0, 1]."""
    pixels = rows.images.reshape(len(rows.images), -1) / np.float32(np.iinfo(rows.images.dtype).max)
    moments = (pixels.mean(axis=1), pixels.std(axis=1), pixels.min(axis=1), pixels.max(axis=1))
    return np.stack([*moments, *np.percentile(pixels, PERCENTILES, axis=1)], axis=1)


def file_size(rows: Rows) -> np.ndarray:
    """(B, 3): width, height, and width / height of the original files, in pixels."""
    height, width = rows.sizes.astype(np.float64).T
    return np.stack([width, height, width / height], axis=1)


def pooled_features(backbone: Backbone) -> Callable[[Rows], np.ndarray]:
    backbone.eval()

    @torch.no_grad()
    def describe(rows: Rows) -> np.ndarray:
        greatest = np.iinfo(rows.images.dtype).max
        images = torch.from_numpy(rows.images).unsqueeze(1).float().div_(greatest)
        return torch.cat([backbone.features(part) for part in images.split(64)]).numpy()

    return describe


def blocks_opened(backbone: Backbone) -> Backbone:
    """The same random network with its residual blocks at work.

    timm starts the last batch norm of every residual block at scale 0, which is good for training but leaves little
    more than the stem of an untrained network; scale 1 makes the stronger control.
    """
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.any():
            torch.nn.init.ones_(module.weight)
    return backbone


def controls(scale: int, seed: int, names: Sequence[str] | None = None) -> list[Control]:
    """The rows in the order of the table; `names`: some of them only.

    scale: side of the images in pixels. HOG has side 128 whatever the scale is, so below 128 it sees enlarged images
    without their finest detail. HOG of masked images sees the mask's outline beside what is left. seed: of the random
    networks. Raises CarinaError for a name that is none.
    """
    border = _border(HOG_SIDE, round(0.1 * HOG_SIDE))
    ring = _border(RING_SIDE, RING_WIDTH)
    mixed_units = (Method("gaussian", "standard"),)
    network = (Method("gaussian", "unit"), Method("knn", "unit"), Method("knn"))
    random = random_backbone("resnet18", min(scale, LARGEST), seed)
    opened = blocks_opened(deepcopy(random))
    rows = [
        Control("raw pixels", lambda r: resized(r.images, PIXEL_SIDE).reshape(len(r.images), -1)),
        Control("HOG", lambda r: hog(r.small)),
        Control(LUNGS_ONLY, lambda r: hog(r.small * r.outlines), lungs=True),
        Control(BACKGROUND_ONLY, lambda r: hog(r.small * (1 - r.outlines)), lungs=True),
        Control("HOG, mask silhouette", lambda r: hog(r.outlines), lungs=True),
        Control("HOG, outer ring", lambda r: hog(r.small * border)),
        Control("pixels, outer ring", lambda r: resized(r.images, RING_SIDE)[:, ring]),
        Control("nine intensity statistics", statistics, mixed_units),
        Control("file size", file_size, mixed_units),
        Control("random ResNet-18", pooled_features(random), network),
        Control("random ResNet-18, blocks opened", pooled_features(opened), network),
    ]
    known = [row.name for row in rows]
    for name in names or ():
        if name not in known:
            raise CarinaError(
                f"there is no control row '{name}'{nearest(name, known)}; it is one of {'; '.join(known)}"
            )
    return [row for row in rows if names is None or row.name in names]


def describe(chunks: Iterable[Rows], rows: Sequence[Control]) -> dict[str, np.ndarray]:
    """Features (N, D) float32 of every control by its name, in one pass over the images.

    No more than a chunk of images (`CHUNK` is a good number) is held at a time. Controls that need lung masks are left
    out where a chunk has none. The features of all eleven take 45 KB an image; where that is too much, describe some of
    them at a time (`controls(names=...)`).
    """
    parts: dict[str, list[np.ndarray]] = {control.name: [] for control in rows}
    for chunk in chunks:
        for control in rows:
            if control.lungs and chunk.lungs is None:
                parts.pop(control.name, None)
            elif control.name in parts:
                parts[control.name].append(control.describe(chunk).astype(np.float32))
    return {name: np.concatenate(values) for name, values in parts.items() if values}


def nothing_to_see(control: Control, features: np.ndarray | None) -> str:
    """Why a control has no row, given its features (N, D); empty where it has one."""
    if features is None:
        return "the store holds no lung masks" if control.lungs else "not described"
    return "the same for every image" if (features == features[0]).all() else ""


def control_rows(
    rows: Sequence[Control], normals: Mapping[str, np.ndarray], scored: Mapping[str, np.ndarray]
) -> list[ControlRow]:
    """Every control under each of its methods, fitted on `normals` and applied to `scored`; both come from `describe`.

    normals: features (N, D) of normal training images. scored: features (n, D) of images of other patients.
    """
    found = []
    for control in rows:
        fitted, rest = normals.get(control.name), scored.get(control.name)
        both = None if fitted is None or rest is None else np.concatenate([fitted, rest])
        missing = nothing_to_see(control, both)
        dimension = 0 if both is None else both.shape[1]
        for method in control.methods:
            scores = None if missing else method.distances(fitted, rest)
            found.append(ControlRow(control.name, str(method), dimension, scores, missing))
    return found
