"""The pasting task: telling a radiograph from itself with a synthetic lesion pasted in, or saying where it was pasted."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from carina.draws import Draws
from carina.errors import CarinaError
from carina.imaging.blending import blend_foreign, interpolate_foreign
from carina.imaging.pasting import JITTER, anatpaste, cutpaste_normal, cutpaste_scar
from carina.imaging.views import ViewSettings, jitter, make_view
from carina.models.backbones import Backbone, resize_images, seeded
from carina.models.features import stages
from carina.recipes import Section

Method = Literal["anatpaste", "cutpaste", "cutpaste_scar", "cutpaste_union", "cutpaste_3way", "fpi", "nsa"]
NEEDS_MASKS = {"anatpaste", "fpi", "nsa"}
TEMPERATURE = 0.2  # of the contrastive term
PROJECTED = 128
FINEST, STAGES = 4, 4  # the dense head's step in pixels, and how many stages it reads at most
GROUPS = 8  # of its normalization
LIGHT = ViewSettings(
    area=(0.8, 1.0), aspect=(0.95, 1.05), rotation=7, shift=0.04, flip=0, gamma=(1, 1), brightness=JITTER,
    contrast=JITTER, blur=0, noise=0,
)  # fmt: skip


class TaskSettings(Section):
    """target: `class` tells originals and pastes apart, `map` says where and how much was pasted. contrast: weight of a
    contrastive term beside it. layers, hidden: of the head for classes; `hidden` is the dense head's width at most."""

    target: Literal["class", "map"]
    contrast: Annotated[float, Field(ge=0)]
    layers: Annotated[int, Field(ge=0)]
    hidden: Annotated[int, Field(ge=1)]


class PastingSettings(TaskSettings):
    method: Method


class PastingHead(nn.Module):
    """[Linear, BN, ReLU] x layers, Linear 128, BN, ReLU, Linear `classes` on (B, D) (Sato et al., iScience 2023)."""

    def __init__(
        self, dimension: int, layers: int, hidden: int, seed: int = 0, batch_norm: bool = True, classes: int = 2
    ):
        super().__init__()
        self.shape = {"layers": layers, "hidden": hidden, "batch_norm": batch_norm, "classes": classes}
        widths = [dimension, *[hidden] * layers, PROJECTED]
        with seeded(seed, "pasting head"):
            blocks: list[nn.Module] = []
            for before, after in pairwise(widths):
                norm = nn.BatchNorm1d(after) if batch_norm else nn.Identity()
                blocks += [nn.Linear(before, after, bias=not batch_norm), norm, nn.ReLU()]
            self.layers = nn.Sequential(*blocks, nn.Linear(PROJECTED, classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)

    def facts(self) -> dict[str, Any]:
        """What `from_tensors` needs beside the state."""
        return {"target": "class", "dimension": self.layers[0].in_features, **self.shape}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> PastingHead:
        """The head whose state and facts these are."""
        head = cls(**{key: value for key, value in facts.items() if key != "target"})
        head.load_state_dict(tensors)
        return head


class DenseHead(nn.Module):
    """Logits of the pasted share at every fourth pixel or so, from the maps of several stages: each brought to one width,
    the coarser added to the finer from the deepest on (Lin et al., "Feature pyramid networks", CVPR 2017).

    stages: the numbers of the backbone's stages that it reads, the first is 1. dimensions: their channels.
    """

    def __init__(self, stages: list[int], dimensions: list[int], width: int, enlarge: int = 1, seed: int = 0):
        super().__init__()
        self.stages, self.dimensions, self.enlarge = stages, dimensions, enlarge
        groups = next(count for count in range(min(GROUPS, width), 0, -1) if width % count == 0)
        with seeded(seed, "dense head"):
            self.lateral = nn.ModuleList(nn.Conv2d(dimension, width, 1) for dimension in dimensions)
            self.smooth = nn.ModuleList(
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width), nn.ReLU())
                for _ in dimensions
            )
            self.logit = nn.Conv2d(width, 1, 1)

    @classmethod
    def of(cls, backbone: Backbone, width: int, seed: int) -> DenseHead:
        """For a backbone: of its stages that step by four pixels or more the last four, of a plain transformer's blocks four
        at equal distances."""
        network, size = backbone.network, backbone.spec.size
        count = len(getattr(network, "feature_info", None) or [])
        if not count or not hasattr(network, "forward_intermediates"):
            raise CarinaError(f"{backbone.spec.name} has no stages that could be read; give target=class")
        trained = {module: module.training for module in backbone.modules()}
        blank = torch.zeros(1, 1, size, size, device=backbone.mean.device)
        with torch.no_grad():
            maps = stages(backbone.eval(), blank, list(range(1, count + 1)))
        for module, mode in trained.items():
            module.training = mode
        steps, channels = [round(size / part.shape[-1]) for part in maps], [part.shape[1] for part in maps]
        usable = [number for number, step in enumerate(steps, 1) if step >= FINEST]
        if len(set(steps)) == 1:
            usable = [usable[round((place + 1) * len(usable) / STAGES) - 1] for place in range(STAGES)]
        chosen = sorted(set(usable[-STAGES:]))
        enlarge = max(1, min(steps[number - 1] for number in chosen) // FINEST)
        return cls(chosen, [channels[number - 1] for number in chosen], width, enlarge, seed)

    def read(self, backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        """The maps that it takes, of images (B, 1, S, S) already at the size that enters the network."""
        return stages(backbone, images, self.stages)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """(B, D, h, w) of each stage, finest first -> logits (B, 1, h', w') at the finest step or, of coarse transformers,
        at a multiple of it."""
        merged = None
        for found, lateral, smooth in zip(reversed(maps), reversed(self.lateral), reversed(self.smooth)):
            found = lateral(found)
            if merged is not None:
                found = found + F.interpolate(merged, found.shape[-2:], mode="bilinear", align_corners=False)
            merged = smooth(found)
        logits = self.logit(merged)
        if self.enlarge > 1:
            logits = F.interpolate(logits, scale_factor=self.enlarge, mode="bilinear", align_corners=False)
        return logits

    def facts(self) -> dict[str, Any]:
        """What `from_tensors` needs beside the state."""
        shape = {"stages": self.stages, "dimensions": self.dimensions, "width": self.logit.in_channels}
        return {"target": "map", **shape, "enlarge": self.enlarge}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> DenseHead:
        """The head whose state and facts these are."""
        head = cls(**{key: value for key, value in facts.items() if key != "target"})
        head.load_state_dict(tensors)
        return head


def pasted_views(
    images: torch.Tensor, masks: torch.Tensor | None, draws: Draws, method: Method, maps: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Views [jittered whole, pasted (of `cutpaste_3way` two, a rectangle and a scar)] and their maps of what was pasted
    [zeros, map, ...]; all (B, 1, S, S) in [0, 1]. Without `maps`, which cost time, None may stand for them.

    masks: the lungs (B, 1, S, S) bool; AnatPaste pastes into them, FPI and NSA around pixels of them where they are given.
    A foreign patch comes from the image's neighbor in the batch: the first and the second trade, the third and the fourth,
    and so on, so that parts of a batch with an even count (other ranks' or micro-batches') keep their partners. An image
    alone has itself.
    """
    whole = jitter(images, draws.part("pasting whole"), JITTER)
    if method == "anatpaste":
        pastes = [anatpaste(whole, masks, draws, maps)]
    elif method in ("fpi", "nsa"):
        partner = np.minimum(np.arange(len(images)) ^ 1, len(images) - 1)
        partner[-1] -= len(images) % 2 and len(images) > 1  # the last of an odd count takes the one before it
        others = whole[torch.from_numpy(partner).to(whole.device)]
        pastes = [(interpolate_foreign if method == "fpi" else blend_foreign)(whole, others, masks, draws)]
    elif method == "cutpaste":
        pastes = [cutpaste_normal(whole, draws)]
    elif method == "cutpaste_scar":
        pastes = [cutpaste_scar(whole, draws)]
    else:
        pastes = [cutpaste_normal(whole, draws), cutpaste_scar(whole, draws)]
        if method == "cutpaste_union":
            coin = torch.from_numpy(draws.coin("pasting kind")).to(images.device)[:, None, None, None]
            pastes = [tuple(torch.where(coin, normal, scar) for normal, scar in zip(*pastes))]
    return [whole, *(view for view, _ in pastes)], [
        whole.new_zeros(()).expand_as(whole),
        *(alpha for _, alpha in pastes),
    ]


def class_loss(logits: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and accuracy of logits (classes x B, classes) of views that stand one class after the other."""
    target = torch.arange(classes, device=logits.device).repeat_interleave(len(logits) // classes)
    accuracy = (logits.argmax(dim=1) == target).float().mean()
    return F.cross_entropy(logits, target), accuracy.detach()


def map_loss(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced cross entropy of logits (B, 1, h, w) with maps in [0, 1] of that shape, and their balanced absolute error.

    What was pasted and what was not count alike in each image where something was, however small it is (an image without
    counts as all background), so that the loss of an image does not depend on the batch.
    """
    positive, negative = target.sum(dim=(1, 2, 3)), (1 - target).sum(dim=(1, 2, 3))
    half = 0.5 * (positive > 0)
    weights = target * (half / positive.clamp(min=1)).view(-1, 1, 1, 1)
    weights = weights + (1 - target) * ((1 - half) / negative.clamp(min=1)).view(-1, 1, 1, 1)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    error = (logits.detach().sigmoid() - target).abs()
    return (weights * entropy).sum() / len(logits), (weights * error).sum() / len(logits)


def contrastive_loss(first: torch.Tensor, second: torch.Tensor, pasted: torch.Tensor) -> torch.Tensor:
    """NT-Xent at temperature 0.2 (Chen et al., arXiv 2002.05709) of two views (B, D) each of the originals; negatives of a
    view are the views of all others and the pasted images (P, D), those of its own among them."""
    views = F.normalize(torch.cat([first, second]), dim=1)
    candidates = torch.cat([views, F.normalize(pasted, dim=1)])
    logits = views @ candidates.T / TEMPERATURE
    logits = logits.masked_fill(
        torch.eye(len(views), len(candidates), dtype=torch.bool, device=views.device), -torch.inf
    )
    twin = torch.arange(len(views), device=views.device).roll(len(first))
    return F.cross_entropy(logits, twin)


class PastingTask(nn.Module):
    """The task of one method on a backbone: its views, its head and its loss.

    head: what a scorer keeps, a PastingHead on pooled features or a DenseHead on maps.
    """

    def __init__(self, backbone: Backbone, settings: PastingSettings, seed: int, batch_norm: bool = True):
        super().__init__()
        self.settings = settings
        self.classes = 3 if settings.method == "cutpaste_3way" else 2
        if settings.target == "class":
            shape = (backbone.dimension, settings.layers, settings.hidden)
            self.head: PastingHead | DenseHead = PastingHead(*shape, seed, batch_norm, self.classes)
        else:
            self.head = DenseHead.of(backbone, min(settings.hidden, 64), seed)
        if settings.contrast > 0:
            dimension = backbone.dimension if settings.target == "class" else self.head.dimensions[-1]
            with seeded(seed, "pasting projector"):
                self.projector = nn.Sequential(
                    nn.Linear(dimension, dimension), nn.ReLU(), nn.Linear(dimension, PROJECTED)
                )

    @property
    def needs_masks(self) -> bool:
        return self.settings.method in NEEDS_MASKS

    @torch.no_grad()
    def views(
        self, images: torch.Tensor, masks: torch.Tensor | None, draws: Draws, size: int
    ) -> dict[str, list[torch.Tensor]]:
        """`views` of `pasted_views` at the size that enters the network; `maps` where they are the target; and, for the
        contrastive term, `light`: two light views of the originals."""
        dense = self.settings.target == "map"
        views, maps = pasted_views(images, masks, draws, self.settings.method, dense)
        found = {"views": [resize_images(view, size) for view in views]}
        if dense:
            found["maps"] = maps
        if self.settings.contrast > 0:
            found["light"] = [make_view(images, draws.part(f"light {number}"), LIGHT, size) for number in range(2)]
        return found

    def loss(self, backbone: Backbone, found: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """All views pass the backbone in one batch, so that batch norm cannot tell them apart. `loss`, and `accuracy` of
        the classes or `map_error` (the balanced absolute error); with a contrastive term also `contrast`."""
        views = torch.cat([*found["views"], *found.get("light", [])])
        count = len(found["views"][0]) * len(found["views"])
        if self.settings.target == "class":
            features = backbone(views)
            loss, accuracy = class_loss(self.head(features[:count]).float(), self.classes)
            out = {"loss": loss, "accuracy": accuracy}
        else:
            maps = self.head.read(backbone, views)
            logits = self.head([part[:count] for part in maps]).float()
            target = torch.cat([F.interpolate(part, logits.shape[-2:], mode="area") for part in found["maps"]])
            loss, error = map_loss(logits, target)
            features = maps[-1].mean(dim=(2, 3))
            out = {"loss": loss, "map_error": error}
        if "light" in found:
            originals = len(found["views"][0])
            projected = self.projector(features[originals:]).float()
            pasted, first, second = projected.split([count - originals, originals, originals])
            with torch.autocast(projected.device.type, enabled=False):
                contrast = contrastive_loss(first, second, pasted)
            out = {**out, "loss": loss + self.settings.contrast * contrast, "contrast": contrast.detach()}
        return out

    def forward(
        self, backbone: Backbone, images: torch.Tensor, masks: torch.Tensor | None, draws: Draws, size: int
    ) -> dict[str, torch.Tensor]:
        """Images (B, 1, S, S) in [0, 1] and their lungs (bool) or None -> what `loss` gives."""
        return self.loss(backbone, self.views(images, masks, draws, size))
