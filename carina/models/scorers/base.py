"""The interface of anomaly scorers and the settings that they share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from carina.errors import CarinaError
from carina.models.backbones import Backbone
from carina.models.features import FeatureSettings, read_maps, read_pooled

# what is read of N images: one array (N, D), or one array (N, D, h, w) for each size and, with places=lungs, behind them
# which places lie in the lungs, (N, 1, h, w) bool
Read = list[np.ndarray]
IN_LUNGS = 0.5  # the part of a place that lies in the lungs, at least


class ScorerSettings(FeatureSettings):
    """Every scorer takes what concerns it; values and their meaning stand in configs/finetune/default.yaml."""

    name: Literal["gaussian", "density", "knn", "memory", "patchcore", "padim", "head"]
    normalize: bool
    components: Annotated[int, Field(ge=1)] | None
    bandwidth: Annotated[float, Field(gt=0)] | None
    neighbors: Annotated[int, Field(ge=1)]
    compress: bool
    patches: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    reach: Annotated[float, Field(ge=0, le=1)]
    dimensions: Annotated[int, Field(ge=1)] | None
    coreset: Annotated[float, Field(gt=0, le=1)]
    places: Literal["all", "lungs"] = "all"
    focal: bool = False
    seed: int


class Scorer(nn.Module):
    """memory: the state holds features of single patients. positions: it reads maps, so that it can draw an anomaly map."""

    memory: ClassVar[bool] = False
    positions: ClassVar[bool] = False

    def __init__(self, settings: ScorerSettings, **tensors: torch.Tensor):
        super().__init__()
        self.settings = settings
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_tensors(cls, settings: ScorerSettings, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> Scorer:
        """The scorer whose state_dict these tensors are and whose `facts` these."""
        return cls(settings, **tensors)

    @classmethod
    def fit(cls, read: Read, settings: ScorerSettings) -> Scorer:
        """From what `read` gave of normal images only, in the rows' order."""
        raise NotImplementedError

    @classmethod
    def read(
        cls, backbone: Backbone, images: torch.Tensor, settings: ScorerSettings, lungs: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """What this scorer reads of images (B, 1, S, S) in [0, 1]: [(B, D)], or [(B, D, h, w), ...], one a size, and behind
        them the places in the lungs (B, 1, S, S) bool where `places` asks for them."""
        if cls.positions:
            return with_places(read_maps(backbone, images, settings), lungs, settings)
        return [read_pooled(backbone, images, settings)]

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        """Distances (B,)."""
        raise NotImplementedError

    def maps(self, read: list[torch.Tensor]) -> torch.Tensor:
        """Anomaly maps (B, h, w), higher is worse; only where `positions`."""
        raise CarinaError(f"scorer {self.settings.name} knows no positions and draws no anomaly map")

    def scaled(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, D, ...), to unit length over D where `normalize` says so."""
        return F.normalize(features, dim=1, eps=1e-12) if self.settings.normalize else features

    def expect(self, read: list[torch.Tensor], shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        """What was read, once each part has its shape behind the images; raise CarinaError else."""
        found = [tuple(part.shape[1:]) for part in read]
        if found != [tuple(shape) for shape in shapes]:
            named = [", ".join("x".join(map(str, shape)) for shape in group) for group in (shapes, found)]
            raise CarinaError(
                f"scorer {self.settings.name} was fitted on features of shape {named[0]} and met {named[1]}; score images "
                "with the backbone, layers and sizes that it was fitted with, or fit it anew at this scale"
            )
        return read

    def facts(self) -> dict[str, Any]:
        """What predictor.json says of this scorer."""
        return {**self.settings.model_dump(), "memory": self.memory}


def with_places(
    maps: list[torch.Tensor], lungs: torch.Tensor | None, settings: ScorerSettings, enlarge: int = 1
) -> list[torch.Tensor]:
    """Maps (B, D, h, w), and behind them, with places=lungs, the places (B, 1, h, w) bool of the finest of them, `enlarge`
    times as fine, at least half of which lies in the lungs (B, 1, S, S) bool; all where there is no such place."""
    if settings.places == "all":
        return maps
    if lungs is None:
        raise CarinaError("scorer.places=lungs needs lung masks; prepare the store with lungs=true")
    side = [enlarge * length for length in max(part.shape[-2:] for part in maps)]
    inside = F.interpolate(lungs.float(), side, mode="area") >= IN_LUNGS
    return [*maps, inside | ~inside.flatten(1).any(dim=1)[:, None, None, None]]


def parted(read: list, settings: ScorerSettings) -> tuple[list, Any]:
    """The maps of what was read, arrays or tensors, and the places (B, h, w) that count, None for all."""
    return (read, None) if settings.places == "all" else (read[:-1], read[-1][:, 0])


def highest(maps: torch.Tensor, places: torch.Tensor | None, settings: ScorerSettings) -> torch.Tensor:
    """(B,) the largest of each map (B, h, w) among the places that count; with `focal` less their median, so that what
    raises all of them does not count."""
    top = (maps if places is None else maps.masked_fill(~places, -torch.inf)).amax(dim=(1, 2))
    if not settings.focal:
        return top
    judged = maps if places is None else maps.masked_fill(~places, torch.nan)
    return top - judged.flatten(1).nanmedian(dim=1).values


PIECE = 1 << 22  # values that are looked at or moved at a time


def pieces(part: np.ndarray) -> Iterator[slice]:
    """Slices of the images of an array-like (N, ...), a few million values each."""
    step = max(1, PIECE // max(1, math.prod(part.shape[1:])))
    return (slice(start, min(start + step, len(part))) for start in range(0, len(part), step))


def check_read(read: Read, settings: ScorerSettings, least: int = 2) -> int:
    """The number of images; raise CarinaError for too few of them or for features that are no numbers."""
    count = len(read[0])
    if count < least:
        raise CarinaError(
            f"scorer.name={settings.name} needs at least {least} normal images, there are {count}; check the rows"
        )
    for part in read:
        bad = 0
        for rows in pieces(part):
            values = np.asarray(part[rows])
            bad += int((~np.isfinite(values.reshape(len(values), -1)).all(axis=1)).sum())
        if bad:
            raise CarinaError(
                f"the features of {bad} of {count} normal images are no finite numbers; check the backbone, whose "
                "training may have diverged"
            )
    return count


def scaled_rows(values: np.ndarray, settings: ScorerSettings) -> np.ndarray:
    """Features (N, D) in double precision, to unit length where `normalize` says so."""
    values = np.asarray(values, dtype=np.float64)
    if settings.normalize:
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return values
