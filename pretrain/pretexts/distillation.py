"""What DINO and DINOv2 share, and SwAV in part: crops of several sizes, prototypes, and a teacher that is the student's
running average (Caron et al., arXiv 2104.14294).

Differences from the paper: centers are kept per scale, and begin with the first mean instead of 0 (until they arrive
there, all images share a prototype, and a short run learns just that); the cosines with the prototypes are taken in
float32 (at a temperature of 0.04 the rounding of bf16 would show), for which the head is our own.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from carina.data.batches import Batch
from carina.errors import CarinaError
from carina.imaging.views import CropSettings, multi_crop
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext
from carina.recipes import Section
from carina.training import ranks
from carina.training.optim import averaged, follow, rising


class DistillationSettings(Section):
    weight: float
    prototypes: Annotated[int, Field(ge=2)]
    hidden: Annotated[int, Field(ge=1)]
    bottleneck: Annotated[int, Field(ge=1)]
    student_temperature: Annotated[float, Field(gt=0)]
    teacher_temperature: Annotated[float, Field(gt=0)]
    warmup_temperature: Annotated[float, Field(gt=0)]
    warmup: Annotated[float, Field(ge=0, le=1)]
    freeze: Annotated[float, Field(ge=0, le=1)]
    momentum: Annotated[float, Field(ge=0, le=1)]
    center_momentum: Annotated[float, Field(ge=0, le=1)]
    crops: CropSettings


def check_sizes(name: str, backbone: Backbone, crops: CropSettings, corpus: Corpus) -> None:
    """Raise CarinaError where the network cannot take the global or the local views."""
    wholes, patch = {corpus.size_of(scale) for scale in corpus.scales}, backbone.patch
    backbone.check_sizes(sorted(wholes))
    try:
        parts = {max(patch, round(crops.local_size * side / patch) * patch) for side in wholes if crops.locals}
        backbone.check_sizes(sorted(parts))
    except CarinaError as error:
        mend = f"pretexts.{name}.crops.local_size=1, or pretexts.{name}.crops.locals=0"
        raise CarinaError(f"{name}'s local views do not fit: {error}, or {mend}") from None


def pair_entropy(targets: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over all pairs of different views: targets (2, B, K) are the probabilities of the first two
    views, logs (V, B, K) the log-probabilities of all."""
    with torch.autocast(logs.device.type, enabled=False):
        pairs = -torch.einsum("tbk,vbk->tv", targets, logs) / targets.shape[1]
    return (pairs.sum() - pairs.diagonal().sum()) / (pairs.numel() - 2)


def gated(weight: torch.Tensor, learning: torch.Tensor) -> torch.Tensor:
    """The same values; their gradient is times `learning` (0 or 1). DDP wants a gradient even where it is zero."""
    return weight.detach() + (weight - weight.detach()) * learning


class PrototypeHead(nn.Module):
    """Features (N, width) -> cosines (N, prototypes) in float32 of a bottleneck with unit prototypes: DINO's head with
    the weight norm of the last layer held at 1, and no batch norm."""

    def __init__(self, width: int, settings: DistillationSettings):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.bottleneck),
        )
        for layer in self.layers[::2]:
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)  # about the paper's 0.02 at 2,048
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(settings.prototypes, settings.bottleneck), dim=1))

    def forward(self, features: torch.Tensor, learning: torch.Tensor | None = None) -> torch.Tensor:
        points = self.layers(features)
        prototypes = self.prototypes if learning is None else gated(self.prototypes, learning)
        with torch.autocast(points.device.type, enabled=False):
            return F.normalize(points.float(), dim=-1) @ F.normalize(prototypes, dim=-1).T


class SelfDistillation(Pretext):
    """A student that predicts, from every crop, how its teacher assigns the global crops to prototypes.

    State: heads and teachers, `step`, and for each scale and head a center, the running mean of the teacher's cosines.
    """

    mixes_batch = False

    def __init__(self, name: str, backbone: Backbone, settings: Any, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        check_sizes(name, backbone, settings.crops, corpus)
        self.name = name
        self.teacher_backbone = averaged(backbone)
        self.heads, self.teacher_heads = nn.ModuleDict(), nn.ModuleDict()
        self.add_head("image", backbone.dimension)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.pending: list[tuple[str, torch.Tensor]] = []

    def add_head(self, kind: str, width: int) -> None:
        with seeded(self.corpus.seed, f"{self.name} {kind} head"):
            self.heads[kind] = PrototypeHead(width, self.settings)
        self.teacher_heads[kind] = averaged(self.heads[kind])
        for scale in self.corpus.scales:
            self.register_buffer(f"center_{kind}_{scale}", torch.zeros(self.settings.prototypes))

    @property
    def teacher(self) -> Backbone:
        return self.teacher_backbone

    def views(self, batch: Batch) -> list[torch.Tensor]:
        """Two global views, which the teacher sees too, then the local ones."""
        draws, size = batch.draws.part(self.name), self.corpus.size_of(batch.scale)
        crops, multiple = self.settings.crops, self.teacher_backbone.patch
        return multi_crop(batch.images, batch.others, draws, self.corpus.views, crops, size, multiple)

    def temperature(self) -> torch.Tensor:
        """The teacher's, rising linearly over the share `warmup` of all steps."""
        first, last = self.settings.warmup_temperature, self.settings.teacher_temperature
        steps = max(1.0, self.settings.warmup * self.corpus.steps)
        begun = (self.step / steps).clamp(max=1) if self.settings.warmup else torch.ones_like(self.step)
        return first + (last - first) * begun

    @torch.no_grad()
    def targets(self, cosines: torch.Tensor, kind: str, scale: int) -> torch.Tensor:
        """Centered and sharpened probabilities (..., K) of the teacher's cosines (..., K)."""
        return ((cosines - getattr(self, f"center_{kind}_{scale}")) / self.temperature()).softmax(dim=-1)

    def predictions(self, features: torch.Tensor, kind: str) -> torch.Tensor:
        """The student's log-probabilities (N, K) of features (N, D)."""
        learning = (self.step >= self.settings.freeze * self.corpus.steps).float()
        return F.log_softmax(self.heads[kind](features, learning) / self.settings.student_temperature, dim=-1)

    def collect(self, kind: str, scale: int, mean: torch.Tensor) -> None:
        """Keep the mean cosines (K,) of this micro-batch and rank for the center."""
        self.pending.append((f"center_{kind}_{scale}", mean))

    @torch.no_grad()
    def after_step(self, backbone: Backbone, step: int) -> None:
        """Let the teacher follow, its momentum rising to 1 by half a cosine; then move the centers."""
        momentum = rising(step, self.corpus.steps, self.settings.momentum)
        follow(self.teacher_backbone, backbone, momentum)
        follow(self.teacher_heads, self.heads, momentum)
        for name in sorted({name for name, _ in self.pending}):
            mean = ranks.mean(torch.stack([value for key, value in self.pending if key == name]).mean(dim=0))
            center = getattr(self, name)
            moved = torch.lerp(mean, center, self.settings.center_momentum)
            if self.settings.center_momentum < 1:
                moved = torch.where(center.any(), moved, mean)
            center.copy_(torch.where(torch.isfinite(mean).all(), moved, center))  # a stray NaN must not stay
        self.pending.clear()
        self.step.fill_(step + 1)
