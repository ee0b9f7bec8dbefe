"""SwAV (Caron et al., arXiv 2006.09882): the prototypes that one view is assigned to are predicted from the others.

Sinkhorn's iteration spreads the images of a step evenly over the prototypes, which rules out that all get the same one.
With labels at hand, a supervised term in the same objective follows Ghesu et al. (arXiv 2201.01283).
Differences from the paper: the queue is kept per scale and helps as soon as it is full; the iteration runs on logarithms.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from lightly.models.modules import SwaVProjectionHead
from pydantic import Field
from torch import nn

from carina.data.batches import Batch
from carina.errors import CarinaError
from carina.imaging.views import CropSettings, multi_crop
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext, information, spread
from carina.pretrain.pretexts.distillation import check_sizes, gated, pair_entropy
from carina.recipes import Section
from carina.training import ranks


class SwAVSettings(Section):
    weight: float
    prototypes: Annotated[int, Field(ge=2)]
    dimension: Annotated[int, Field(ge=2)]
    temperature: Annotated[float, Field(gt=0)]
    epsilon: Annotated[float, Field(gt=0)]
    iterations: Annotated[int, Field(ge=1)]
    queue: Annotated[int, Field(ge=0)]
    freeze: Annotated[float, Field(ge=0, le=1)]
    supervised: Annotated[float, Field(ge=0)]
    labels: list[str]
    crops: CropSettings


@torch.no_grad()
def sinkhorn(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Scores (B, K) -> codes (B, K): every row sums to 1 and, with enough iterations, every column to B / K (Cuturi,
    arXiv 1306.0895)."""
    logs = scores / epsilon
    for _ in range(iterations):
        logs = logs - logs.logsumexp(dim=0, keepdim=True)
        logs = logs - logs.logsumexp(dim=1, keepdim=True)
    return logs.exp()


def labelled_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of logits (V, B, L) with targets (B, L), averaged over the known targets of all ranks.

    Unknown (NaN) and uncertain (-1) targets do not count.
    """
    known = (targets >= 0).expand_as(logits)
    targets = torch.where(known, targets.expand_as(logits), 0.0)
    summed = F.binary_cross_entropy_with_logits(logits, targets, weight=known.float(), reduction="sum")
    return summed / ranks.mean(known.sum().float()).clamp(min=1 / ranks.world())


class SwAV(Pretext):
    healthy = (
        "the loss starts above log(prototypes) and falls below it, while information and spread stay well above 0; a loss "
        "that comes to rest at log(prototypes) means that all images look alike to the prototypes"
    )
    remedy = (
        "lower optim.lr, take fewer prototypes or a pretexts.swav.epsilon of 0.03, and for batches smaller than the "
        "number of prototypes a pretexts.swav.queue"
    )

    def __init__(self, backbone: Backbone, settings: SwAVSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        check_sizes("swav", backbone, settings.crops, corpus)
        width, self.multiple = backbone.dimension, backbone.patch
        with seeded(corpus.seed, "swav head"):
            self.head = SwaVProjectionHead(width, width, settings.dimension)
            self.prototypes = nn.Parameter(F.normalize(torch.randn(settings.prototypes, settings.dimension), dim=1))
        if settings.supervised and not settings.labels:
            raise CarinaError(
                "pretexts.swav.supervised needs label columns; name them, as in pretexts.swav.labels=[Pneumonia]"
            )
        if settings.supervised:
            with seeded(corpus.seed, "swav labels"):
                self.classifier = nn.Linear(width, len(settings.labels))
        self.length = settings.queue // corpus.batch_size * corpus.batch_size
        if settings.queue and not self.length:
            raise CarinaError(
                f"pretexts.swav.queue={settings.queue} is shorter than a batch of {corpus.batch_size}; give "
                f"{corpus.batch_size} or more, or 0 for none"
            )
        if self.length:
            for scale in corpus.scales:
                self.register_buffer(f"queue_{scale}", torch.zeros(2, self.length, settings.dimension))
            self.register_buffer("written", torch.zeros(len(corpus.scales), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.pending: list[tuple[int, torch.Tensor]] = []

    @property
    def labels(self) -> list[str]:
        return list(self.settings.labels) if self.settings.supervised else []

    def views(self, batch: Batch) -> list[torch.Tensor]:
        """Two global views, then the local ones."""
        draws, size = batch.draws.part("swav"), self.corpus.size_of(batch.scale)
        crops = self.settings.crops
        return multi_crop(batch.images, batch.others, draws, self.corpus.views, crops, size, self.multiple)

    @torch.no_grad()
    def codes(self, points: torch.Tensor, scale: int) -> torch.Tensor:
        """Codes (2, B, K) of unit vectors (2, B, D) of the global views, balanced over the batch of all ranks."""
        joined = torch.stack([ranks.gather(view) for view in points])
        rows = ranks.own_rows(points.shape[1], points.device)
        if self.length:
            self.pending.append((scale, joined))
            if self.written[self.corpus.scales.index(scale)] >= self.length:
                joined = torch.cat([joined, getattr(self, f"queue_{scale}")], dim=1)
        s = self.settings
        return torch.stack([sinkhorn(view @ self.prototypes.T, s.epsilon, s.iterations)[rows] for view in joined])

    def loss(self, backbone: Backbone, views: list[torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """Cross entropy of the codes of the global views and the assignments of all others, plus the supervised term.

        information: of the softmax assignments of the global views, without Sinkhorn; spread: of the embedding.
        """
        features = [backbone(torch.cat(views[:2]))]
        if views[2:]:
            features.append(backbone(torch.cat(views[2:])))
        embedding = self.head(torch.cat(features))
        learning = (self.step >= self.settings.freeze * self.corpus.steps).float()
        with torch.autocast(embedding.device.type, enabled=False):
            points = F.normalize(embedding.float(), dim=1).unflatten(0, (len(views), -1))
            scores = points @ gated(self.prototypes, learning).T / self.settings.temperature
            loss = pair_entropy(self.codes(points[:2], batch.scale), F.log_softmax(scores, dim=-1))
        figures = {"information": information(scores[:2].softmax(dim=-1).flatten(0, 1)), "spread": spread(points[0])}
        if not self.labels:
            return {"loss": loss, **figures}
        logits = self.classifier(features[0]).float().unflatten(0, (2, -1))
        supervised = labelled_entropy(logits, batch.targets)
        total = loss + self.settings.supervised * supervised
        return {"loss": total, "swapped": loss.detach(), "supervised": supervised.detach(), **figures}

    @torch.no_grad()
    def after_step(self, backbone: Backbone, step: int) -> None:
        """Bring the prototypes back to unit length and put the step's embeddings of all ranks into the queue."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))
        for scale, joined in self.pending:
            if not torch.isfinite(joined).all():  # a stray NaN must not stay in the queue
                continue
            index = self.corpus.scales.index(scale)
            start = int(self.written[index]) % self.length
            getattr(self, f"queue_{scale}")[:, start : start + joined.shape[1]] = joined
            self.written[index] += joined.shape[1]
        self.pending.clear()
        self.step.fill_(step + 1)
