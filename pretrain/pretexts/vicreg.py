"""VICReg (Bardes et al., arXiv 2105.04906): equal embeddings of two views, dimensions that vary and do not covary.

No negatives; variance and covariance are those of the joined batch of all ranks.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import VICRegProjectionHead
from pydantic import Field

from carina.data.batches import Batch
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext, spread
from carina.recipes import Section
from carina.training.ranks import gather

EPSILON = 1e-4  # under the root of the variance, as in the paper


class VICRegSettings(Section):
    weight: float
    dimension: Annotated[int, Field(ge=2)]
    invariance: Annotated[float, Field(ge=0)]
    variance: Annotated[float, Field(ge=0)]
    covariance: Annotated[float, Field(ge=0)]


def hinge_and_covariance(embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For (N, D): the mean shortfall of the dimensions' standard deviation below 1, and the sum of squared covariances of
    different dimensions over D; both with N - 1."""
    count, width = embedding.shape
    centered = embedding - embedding.mean(dim=0)
    covariance = centered.T @ centered / (count - 1)
    variance = covariance.diagonal()
    shortfall = F.relu(1 - (variance + EPSILON).sqrt()).mean()
    return shortfall, (covariance.square().sum() - variance.square().sum()) / width


class VICReg(Pretext):
    healthy = (
        "variance (what the deviations lack to 1) falls towards 0, invariance and covariance rise at first and then fall "
        "slowly; batches under 128 images estimate the covariances poorly and keep covariance high"
    )
    remedy = "raise batch_size (256 and more), raise pretexts.vicreg.variance, or lower optim.lr"

    def __init__(self, backbone: Backbone, settings: VICRegSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        self.needs_images(2, "vicreg takes variances over the batch")
        width = settings.dimension
        with seeded(corpus.seed, "vicreg head"):
            self.head = VICRegProjectionHead(backbone.dimension, width, width)

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair(batch, "vicreg first", "vicreg second")

    def loss(
        self, backbone: Backbone, views: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The weighted sum of invariance (mean squared difference), variance and covariance (both views summed), as in
        the paper's algorithm 1."""
        embedding = self.head(backbone(torch.cat(views)))
        with torch.autocast(embedding.device.type, enabled=False):
            first, second = (gather(part) for part in embedding.float().chunk(2))
            invariance = F.mse_loss(first, second)
            variance, covariance = (sum(pair) for pair in zip(*map(hinge_and_covariance, (first, second))))
        parts = {
            "invariance": self.settings.invariance * invariance,
            "variance": self.settings.variance * variance,
            "covariance": self.settings.covariance * covariance,
        }
        return {
            "loss": sum(parts.values()),
            **{name: value.detach() for name, value in parts.items()},
            "spread": spread(first),
        }
