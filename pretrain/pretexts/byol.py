"""BYOL (Grill et al., arXiv 2006.07733): predict the other view's projection by a slow copy of the network.

No negatives, so nothing is said about images of the same patient. What keeps the embedding from collapsing is the
predictor together with the slow target; `predictor: false` collapses on purpose. Both views pass the networks, and their
batch norms, as one batch.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from pydantic import Field
from torch import nn

from carina.data.batches import Batch
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext, spread
from carina.recipes import Section
from carina.training.optim import averaged, follow, rising


class BYOLSettings(Section):
    weight: float
    dimension: Annotated[int, Field(ge=2)]
    hidden: Annotated[int, Field(ge=1)]
    momentum: Annotated[float, Field(ge=0, le=1)]
    predictor: bool


class BYOL(Pretext):
    healthy = (
        "the loss starts at 2 to 4, falls fast at first, may rise while the target moves, and stays well above 0 while "
        "spread stays up; a loss that runs to 0 together with spread is a collapse"
    )
    remedy = (
        "keep pretexts.byol.predictor=true, lower optim.lr, or let the target move faster (pretexts.byol.momentum=0.99) "
        "where steps or images are few"
    )

    def __init__(self, backbone: Backbone, settings: BYOLSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        self.needs_images(2, "byol has batch norm in its heads")
        with seeded(corpus.seed, "byol head"):
            self.head = BYOLProjectionHead(backbone.dimension, settings.hidden, settings.dimension)
        with seeded(corpus.seed, "byol predictor"):
            predictor = BYOLPredictionHead(settings.dimension, settings.hidden, settings.dimension)
        self.predictor = predictor if settings.predictor else nn.Identity()
        self.target_backbone = averaged(backbone)
        self.target_head = averaged(self.head)

    @property
    def teacher(self) -> Backbone:
        return self.target_backbone

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair(batch, "byol first", "byol second")

    def loss(
        self, backbone: Backbone, views: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> dict[str, torch.Tensor]:
        """Squared distance of the unit vectors of each view's prediction and the other view's target, summed over both
        directions: 0 to 8."""
        images = torch.cat(views)
        projections = self.head(backbone(images))
        predictions = self.predictor(projections)
        with torch.no_grad():
            targets = self.target_head(self.target_backbone(images))
        with torch.autocast(images.device.type, enabled=False):
            swapped = targets.float().roll(len(views[0]), dims=0)  # each view meets the other's target
            cosine = F.cosine_similarity(predictions.float(), swapped, dim=1)
        return {"loss": 4 * (1 - cosine.mean()), "spread": spread(projections)}

    @torch.no_grad()
    def after_step(self, backbone: Backbone, step: int) -> None:
        """The target follows, ever more slowly: its momentum rises to 1 by half a cosine."""
        momentum = rising(step, self.corpus.steps, self.settings.momentum)
        follow(self.target_backbone, backbone, momentum)
        follow(self.target_head, self.head, momentum)
