"""The pasting task: a head on pooled features that tells a radiograph from itself with a lesion pasted in."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from carina.draws import Draws
from carina.imaging.pasting import JITTER, anatpaste
from carina.imaging.views import jitter
from carina.models.backbones import Backbone, seeded
from carina.recipes import Section


class PastingSettings(Section):
    layers: Annotated[int, Field(ge=0)]
    hidden: Annotated[int, Field(ge=1)]


class PastingHead(nn.Module):
    """[Linear, BN, ReLU] x layers, Linear 128, BN, ReLU, Linear 2 on (B, D) features (Sato et al., iScience 2023)."""

    def __init__(self, dimension: int, settings: PastingSettings, seed: int, batch_norm: bool = True):
        super().__init__()
        widths = [dimension, *[settings.hidden] * settings.layers, 128]
        with seeded(seed, "pasting head"):
            blocks: list[nn.Module] = []
            for before, after in pairwise(widths):
                norm = nn.BatchNorm1d(after) if batch_norm else nn.Identity()
                blocks += [nn.Linear(before, after, bias=not batch_norm), norm, nn.ReLU()]
            self.layers = nn.Sequential(*blocks, nn.Linear(128, 2))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


def pasting_views(
    images: torch.Tensor, masks: torch.Tensor, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The jittered image, the same with a pasted lesion, and alpha; all (B, 1, S, S)."""
    whole = jitter(images, draws.part("pasting whole"), JITTER)
    pasted, alpha = anatpaste(whole, masks, draws)
    return whole, pasted, alpha


def pasting_loss(
    backbone: Backbone, head: PastingHead, whole: torch.Tensor, pasted: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Cross entropy of (original, pasted), both halves in one batch so that batch norm cannot tell them apart."""
    logits = head(backbone(torch.cat([whole, pasted]))).float()
    target = torch.cat([torch.zeros(len(whole)), torch.ones(len(pasted))]).to(logits.device, torch.int64)
    accuracy = (logits.argmax(dim=1) == target).float().mean()
    return {"loss": F.cross_entropy(logits, target), "accuracy": accuracy.detach()}
