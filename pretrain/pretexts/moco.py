"""MoCo v2 (Chen et al., arXiv 2003.04297): a query must find its key among the keys of earlier batches.

Differences from the paper, all for small medical corpora: the queue holds at most half the corpus; keys of the same
patient are no negatives; the key network's batch norm sees shuffled groups, which also works on one process; the views
are those that keep the meaning of a radiograph (no flip, no cutout); every scale has its own queue.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from lightly.models.modules import MoCoProjectionHead
from pydantic import Field

from carina.data.batches import Batch
from carina.draws import permutation
from carina.errors import CarinaError
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext, spread
from carina.recipes import Section
from carina.training.optim import averaged, follow
from carina.training.ranks import gather

GROUPS = 4  # of the key batch; each has batch statistics of its own


class MoCoSettings(Section):
    weight: float
    temperature: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, le=1)]
    queue: Annotated[int, Field(ge=1)]
    dimension: Annotated[int, Field(ge=2)]
    exclude: Literal["image", "study", "patient"]


class MoCo(Pretext):
    mixes_batch = False  # negatives come from the queue
    healthy = "the loss rises while the queue fills, then falls for the whole run; flat at log(queue) means no learning"

    def __init__(self, backbone: Backbone, settings: MoCoSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        width = backbone.dimension
        with seeded(corpus.seed, "moco head"):
            self.head = MoCoProjectionHead(width, width, settings.dimension)
        self.key_backbone = averaged(backbone)
        self.key_head = averaged(self.head)
        self.has_batch_norm = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
        if self.has_batch_norm:
            self.needs_images(2 * GROUPS, f"moco deals the keys of a network with batch norm into {GROUPS} groups")
        length = min(settings.queue, corpus.count // 2) // corpus.batch_size * corpus.batch_size
        if length == 0:
            raise CarinaError(
                f"moco's queue may hold half of the {corpus.count} images, which is less than one batch of "
                f"{corpus.batch_size}; give batch_size={corpus.count // 2} or less"
            )
        for scale in corpus.scales:
            with seeded(corpus.seed, f"moco queue {scale}"):
                keys = F.normalize(torch.randn(length, settings.dimension), dim=1)
            self.register_buffer(f"queue_{scale}", keys)
            self.register_buffer(f"owners_{scale}", torch.full((length,), -1, dtype=torch.int64))
        self.register_buffer("places", torch.zeros(len(corpus.scales), dtype=torch.int64))
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    @property
    def teacher(self) -> Backbone:
        return self.key_backbone

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair(batch, "moco query", "moco key")

    @torch.no_grad()
    def keys(self, images: torch.Tensor, key: tuple[int, ...]) -> torch.Tensor:
        """Keys (B, D) of unit length. With batch norm the batch is dealt into shuffled groups (shuffling batch norm)."""
        if not self.has_batch_norm:
            return F.normalize(self.key_head(self.key_backbone(images)).float(), dim=1)
        order = torch.from_numpy(permutation(len(images), "moco groups", *key)).to(images.device)
        groups = [self.key_head(self.key_backbone(images[part])) for part in order.tensor_split(GROUPS)]
        keys = F.normalize(torch.cat(groups).float(), dim=1)
        return keys[torch.argsort(order)]

    def loss(
        self, backbone: Backbone, views: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> dict[str, torch.Tensor]:
        """InfoNCE over one positive and the queue, without the keys of the query's own patient."""
        queries = F.normalize(self.head(backbone(views[0])).float(), dim=1)
        keys = self.keys(views[1], batch.key)
        owners = batch.groups[self.settings.exclude]
        queue, queue_owners = getattr(self, f"queue_{batch.scale}"), getattr(self, f"owners_{batch.scale}")
        with torch.autocast(queries.device.type, enabled=False):
            positive = (queries * keys).sum(dim=1, keepdim=True)
            negative = queries @ queue.T
        negative = negative.masked_fill(owners[:, None] == queue_owners[None, :], float("-inf"))
        logits = torch.cat([positive, negative], dim=1) / self.settings.temperature
        target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        self.pending.append((batch.scale, keys, owners))
        accuracy = (logits.argmax(dim=1) == 0).float().mean()
        return {"loss": F.cross_entropy(logits, target), "accuracy": accuracy.detach(), "spread": spread(queries)}

    @torch.no_grad()
    def after_step(self, backbone: Backbone, step: int) -> None:
        """Let the key network follow, then put the step's keys of all ranks into the queue."""
        follow(self.key_backbone, backbone, self.settings.momentum)
        follow(self.key_head, self.head, self.settings.momentum)
        for scale, keys, owners in self.pending:
            keys, owners = gather(keys), gather(owners)
            if not torch.isfinite(keys).all():  # a stray NaN must not stay in the queue
                continue
            queue, queue_owners = getattr(self, f"queue_{scale}"), getattr(self, f"owners_{scale}")
            index = self.corpus.scales.index(scale)
            start = int(self.places[index])
            queue[start : start + len(keys)] = keys
            queue_owners[start : start + len(keys)] = owners
            self.places[index] = (start + len(keys)) % len(queue)
        self.pending.clear()
