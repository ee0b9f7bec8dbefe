"""The pasting task: a head on pooled features that tells a radiograph from itself with a lesion pasted in, or with one
of two kinds."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from carina.draws import Draws
from carina.imaging.pasting import JITTER, anatpaste, cutpaste_normal, cutpaste_scar
from carina.imaging.views import jitter
from carina.models.backbones import Backbone, seeded
from carina.recipes import Section


class PastingSettings(Section):
    layers: Annotated[int, Field(ge=0)]
    hidden: Annotated[int, Field(ge=1)]


class PastingHead(nn.Module):
    """[Linear, BN, ReLU] x layers, Linear 128, BN, ReLU, Linear `classes` on (B, D) (Sato et al., iScience 2023)."""

    def __init__(self, dimension: int, settings: PastingSettings, seed: int, batch_norm: bool = True, classes: int = 2):
        super().__init__()
        widths = [dimension, *[settings.hidden] * settings.layers, 128]
        with seeded(seed, "pasting head"):
            blocks: list[nn.Module] = []
            for before, after in pairwise(widths):
                norm = nn.BatchNorm1d(after) if batch_norm else nn.Identity()
                blocks += [nn.Linear(before, after, bias=not batch_norm), norm, nn.ReLU()]
            self.layers = nn.Sequential(*blocks, nn.Linear(128, classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


def pasting_views(
    images: torch.Tensor, masks: torch.Tensor, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The jittered image, the same with a pasted lesion, and alpha; all (B, 1, S, S)."""
    whole = jitter(images, draws.part("pasting whole"), JITTER)
    pasted, alpha = anatpaste(whole, masks, draws)
    return whole, pasted, alpha


def cutpaste_views(
    images: torch.Tensor, draws: Draws, kind: Literal["normal", "scar", "union", "3way"]
) -> tuple[torch.Tensor, ...]:
    """The jittered image, then the same with a rectangle of itself pasted in, one tensor (B, 1, S, S) a class.

    kind: ``normal`` (an upright rectangle), ``scar`` (a long thin one), ``union`` (a coin decides which, sample by
    sample), ``3way`` (both, each a class of its own). Li et al., arXiv 2104.04015.
    """
    whole = jitter(images, draws.part("pasting whole"), JITTER)
    if kind == "normal":
        return whole, cutpaste_normal(whole, draws)[0]
    if kind == "scar":
        return whole, cutpaste_scar(whole, draws)[0]
    normal, scar = cutpaste_normal(whole, draws)[0], cutpaste_scar(whole, draws)[0]
    if kind == "3way":
        return whole, normal, scar
    coin = torch.from_numpy(draws.coin("pasting kind")).to(images.device)
    return whole, torch.where(coin[:, None, None, None], normal, scar)


def pasting_loss(backbone: Backbone, head: PastingHead, *views: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross entropy of telling the views apart (original, pasted, ...), all (B, 1, S, S) and in one batch, so that batch
    norm cannot tell them apart."""
    logits = head(backbone(torch.cat(views))).float()
    target = torch.arange(len(views), device=logits.device).repeat_interleave(len(views[0]))
    accuracy = (logits.argmax(dim=1) == target).float().mean()
    return {"loss": F.cross_entropy(logits, target), "accuracy": accuracy.detach()}
