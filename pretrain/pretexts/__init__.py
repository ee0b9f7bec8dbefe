"""Pretexts: one file per method, each read top to bottom. This one holds what they share and lists them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from carina.data.batches import Batch
from carina.errors import CarinaError
from carina.imaging.views import ViewSettings, make_view
from carina.models.backbones import Backbone


@dataclass(frozen=True)
class Corpus:
    """What a pretext may know of the run before it starts.

    count: images. batch_size: of one optimizer step over all ranks; micro_batch: of one forward pass on one rank.
    scales: sides read from the store; size: what enters the network (None: the scale). steps: optimizer steps of the
    whole run.
    """

    count: int
    batch_size: int
    micro_batch: int
    scales: tuple[int, ...]
    size: int | None
    views: ViewSettings
    seed: int
    steps: int

    def size_of(self, scale: int) -> int:
        return self.size or scale


class Pretext(nn.Module):
    """A method: its networks and its state (all of it parameters and buffers, so that a checkpoint holds it), its views
    and its loss.

    needs_masks: batches carry the lungs. mixes_batch: the loss of an image depends on the other images of the
    micro-batch, so that `accumulate` changes the objective. skips_parameters: some steps leave parameters of the backbone
    or of its own without a gradient. healthy: what a healthy curve looks like, in words.
    remedy: what helps when it collapses. teacher: the averaged backbone of methods that have one.
    """

    needs_masks: ClassVar[bool] = False
    mixes_batch: ClassVar[bool] = True
    skips_parameters: ClassVar[bool] = False
    healthy: ClassVar[str]
    remedy: ClassVar[str] = "lower optim.lr, or raise batch_size"

    def __init__(self, backbone: Backbone, settings: Any, corpus: Corpus):
        super().__init__()
        self.settings, self.corpus = settings, corpus

    def needs_images(self, count: int, why: str) -> None:
        """Raise CarinaError for micro-batches of fewer than `count` images on a process."""
        if self.corpus.micro_batch < count:
            raise CarinaError(
                f"{why} and needs at least {count} images a process and micro-batch, not {self.corpus.micro_batch}; raise "
                "batch_size or lower accumulate"
            )

    def pair(self, batch: Batch, first: str, second: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Two views (B, 1, size, size) of each positive pair, drawn under these names."""
        settings, size = self.corpus.views, self.corpus.size_of(batch.scale)
        return (
            make_view(batch.images, batch.draws.part(first), settings, size),
            make_view(batch.others, batch.draws.part(second), settings, size),
        )

    @property
    def labels(self) -> list[str]:
        """Label columns that the loss reads from `batch.targets`, in this order; none for all but supervised terms."""
        return []

    @property
    def teacher(self) -> Backbone | None:
        return None

    def views(self, batch: Batch) -> Any:
        raise NotImplementedError

    def loss(self, backbone: Backbone, views: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """`loss` (a scalar, the mean over the micro-batch of this rank or of all) and figures worth watching: `spread`
        of an embedding, `information` of assignments, accuracies, the parts of the loss."""
        raise NotImplementedError

    def after_step(self, backbone: Backbone, step: int) -> None:
        """After the optimizer step number `step`, counted from 0. Nothing by default."""


@torch.no_grad()
def spread(embedding: torch.Tensor) -> torch.Tensor:
    """Mean standard deviation per dimension of unit vectors (B, D), times sqrt(D): 1 when they fill the sphere, 0 when
    all are one point (the measure of SimSiam, Chen and He, arXiv 2011.10566)."""
    unit = F.normalize(embedding.detach().float(), dim=1)
    return unit.std(dim=0, unbiased=False).mean() * unit.shape[1] ** 0.5


@torch.no_grad()
def information(assignments: torch.Tensor) -> torch.Tensor:
    """Mutual information of samples and prototypes, in shares of its largest value: H(mean p) - mean H(p) over
    log(min(B, K)) for probabilities (B, K). 0 when every sample gets the same assignment, uniform or one prototype."""
    p = assignments.detach().float()

    def entropy(q: torch.Tensor) -> torch.Tensor:
        return -torch.xlogy(q, q).sum(dim=-1)

    largest = torch.log(torch.tensor(float(min(p.shape))))
    return (entropy(p.mean(dim=0)) - entropy(p).mean()) / largest.to(p.device)


METHODS = {
    "simclr": "SimCLR",
    "moco": "MoCo",
    "mae": "MAE",
    "dino": "DINO",
    "swav": "SwAV",
    "byol": "BYOL",
    "barlow": "BarlowTwins",
    "vicreg": "VICReg",
    "mocov3": "MoCoV3",
    "simmim": "SimMIM",
    "dinov2": "DINOv2",
    "anatpaste": "AnatPaste",
    "cutpaste": "CutPaste",
    "nsa": "NSA",
    "patches": "PatchContrast",
}  # name in the recipe and of the file -> class


def method(name: str) -> type[Pretext]:
    """The class of a method. Its file is imported only now, because it imports this one."""
    return getattr(import_module(f"carina.pretrain.pretexts.{name}"), METHODS[name])
