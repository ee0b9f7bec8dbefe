"""BYOL (Grill et al., arXiv 2006.07733): predict the other view's projection by a slow copy of the network.

No negatives, so nothing is said about images of the same patient. What keeps the embedding from collapsing is the
predictor together with the slow target; `predictor: false` collapses on purpose.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import torch.nn.functional as F
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from pydantic import Field
from torch import nn

from carina.data.batches import Batch
from carina.errors import CarinaError
from carina.imaging.views import make_view
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext, spread
from carina.recipes import Section


class BYOLSettings(Section):
    weight: float
    dimension: Annotated[int, Field(ge=2)]
    hidden: Annotated[int, Field(ge=1)]
    momentum: Annotated[float, Field(ge=0, le=1)]
    predictor: bool


class BYOL(Pretext):
    mixes_batch = False  # but for batch norm
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
        if corpus.micro_batch < 2:
            raise CarinaError(
                "byol's heads have batch norm and need at least 2 images a process and micro-batch; raise batch_size or "
                "lower accumulate"
            )
        with seeded(corpus.seed, "byol head"):
            self.head = BYOLProjectionHead(backbone.dimension, settings.hidden, settings.dimension)
        with seeded(corpus.seed, "byol predictor"):
            predictor = BYOLPredictionHead(settings.dimension, settings.hidden, settings.dimension)
        self.predictor = predictor if settings.predictor else nn.Identity()
        self.target_backbone = copy.deepcopy(backbone)
        self.target_head = copy.deepcopy(self.head)
        deactivate_requires_grad(self.target_backbone)
        deactivate_requires_grad(self.target_head)

    @property
    def teacher(self) -> Backbone:
        return self.target_backbone

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        settings, size = self.corpus.views, self.corpus.size_of(batch.scale)
        return (
            make_view(batch.images, batch.draws.part("byol first"), settings, size),
            make_view(batch.others, batch.draws.part("byol second"), settings, size),
        )

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
        momentum = cosine_schedule(step, self.corpus.steps, self.settings.momentum, 1.0)
        update_momentum(backbone, self.target_backbone, momentum)
        update_momentum(self.head, self.target_head, momentum)
