"""Barlow Twins (Zbontar et al., arXiv 2103.03230): the cross-correlation of two views' embeddings must be the identity.

No negatives; the statistics are those of the joined batch of all ranks.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from lightly.models.modules import BarlowTwinsProjectionHead
from pydantic import Field

from carina.data.batches import Batch
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext, spread
from carina.recipes import Section
from carina.training.ranks import gather


class BarlowTwinsSettings(Section):
    weight: float
    dimension: Annotated[int, Field(ge=2)]
    redundancy: Annotated[float, Field(ge=0)]


def cross_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(D, D) correlations of the dimensions of (N, D) and (N, D) over the batch."""
    first, second = (F.batch_norm(z, None, None, training=True) for z in (first, second))
    return first.T @ second / len(first)


class BarlowTwins(Pretext):
    healthy = (
        "the diagonal part falls fast while redundancy rises a little, then both fall slowly; batches under 128 images "
        "estimate the correlations poorly and keep redundancy high"
    )
    remedy = "raise batch_size (256 and more), lower pretexts.barlow.dimension towards it, or lower optim.lr"

    def __init__(self, backbone: Backbone, settings: BarlowTwinsSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        self.needs_images(2, "barlow correlates over the batch")
        width = settings.dimension
        with seeded(corpus.seed, "barlow head"):
            self.head = BarlowTwinsProjectionHead(backbone.dimension, width, width)

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair(batch, "barlow first", "barlow second")

    def loss(
        self, backbone: Backbone, views: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> dict[str, torch.Tensor]:
        """Sum of (1 - C_ii)^2 plus `redundancy` times the sum of the other C_ij^2; a sum, as in the paper, so that it
        grows with the dimension."""
        embedding = self.head(backbone(torch.cat(views)))
        with torch.autocast(embedding.device.type, enabled=False):
            first, second = (gather(part) for part in embedding.float().chunk(2))
            correlation = cross_correlation(first, second)
            diagonal = correlation.diagonal()
            on = (1 - diagonal).square().sum()
            off = correlation.square().sum() - diagonal.square().sum()
        return {
            "loss": on + self.settings.redundancy * off,
            "diagonal": on.detach(),
            "redundancy": self.settings.redundancy * off.detach(),
            "spread": spread(first),
        }
