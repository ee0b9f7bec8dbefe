"""MoCo v3 (Chen et al., arXiv 2104.02057): a predicted query must find its key among the keys of the same step.

No queue: negatives are the keys of all ranks, without those of the query's own patient. This loss leaves the patch
embedding of a transformer alone, which the paper found to keep training steady; alone it stays as it was initialized,
in a mixture the other methods train it. Both views pass the networks, and their batch norms, as one batch.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from lightly.models.modules import MoCoProjectionHead
from pydantic import Field

from carina.data.batches import Batch
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext, spread
from carina.pretrain.pretexts.masking import hooked
from carina.recipes import Section
from carina.training.optim import averaged, follow, rising
from carina.training.ranks import gather, own_rows


class MoCoV3Settings(Section):
    weight: float
    temperature: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, le=1)]
    dimension: Annotated[int, Field(ge=2)]
    hidden: Annotated[int, Field(ge=1)]
    exclude: Literal["image", "study", "patient"]
    freeze_patches: bool


class MoCoV3(Pretext):
    healthy = (
        "the loss starts near 4 x temperature x log(batch_size) and falls for the whole run while accuracy climbs; sudden "
        "dips of accuracy are the instability of transformers"
    )
    remedy = (
        "lower optim.lr, keep pretexts.mocov3.freeze_patches=true, or raise pretexts.mocov3.temperature or batch_size"
    )

    def __init__(self, backbone: Backbone, settings: MoCoV3Settings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        self.needs_images(2, "mocov3 finds its negatives in the batch")
        hidden, out = settings.hidden, settings.dimension
        with seeded(corpus.seed, "mocov3 head"):
            self.head = MoCoProjectionHead(backbone.dimension, hidden, out, num_layers=3, batch_norm=True)
        with seeded(corpus.seed, "mocov3 predictor"):
            self.predictor = MoCoProjectionHead(out, hidden, out, num_layers=2, batch_norm=True)
        self.key_backbone = averaged(backbone)
        self.key_head = averaged(self.head)
        self.frozen = settings.freeze_patches and backbone.family == "vit"
        self.skips_parameters = self.frozen

    @property
    def teacher(self) -> Backbone:
        return self.key_backbone

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair(batch, "mocov3 first", "mocov3 second")

    def loss(
        self, backbone: Backbone, views: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> dict[str, torch.Tensor]:
        """InfoNCE of each view's queries among the other view's keys, both directions summed, times 2 x temperature
        (the paper's algorithm 1)."""
        images, temperature = torch.cat(views), self.settings.temperature
        with hooked(backbone.network.patch_embed, torch.detach) if self.frozen else nullcontext():
            queries = self.predictor(self.head(backbone(images)))
        with torch.no_grad():
            keys = self.key_head(self.key_backbone(images))
        owners = batch.groups[self.settings.exclude]
        everyone, rows = gather(owners), own_rows(len(owners), owners.device)
        ruled_out = owners[:, None] == everyone[None, :]
        ruled_out[torch.arange(len(rows), device=rows.device), rows] = False
        with torch.autocast(images.device.type, enabled=False):
            queries, keys = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
            pairs = zip(queries.chunk(2), reversed(keys.chunk(2)))
            logits = torch.stack([query @ gather(key).T for query, key in pairs]) / temperature  # (2, B, joined batch)
            logits = logits.masked_fill(ruled_out, float("-inf")).flatten(0, 1)
            target = rows.repeat(2)
            loss = 4 * temperature * F.cross_entropy(logits, target)  # the mean over both directions is half their sum
        accuracy = (logits.detach().argmax(dim=1) == target).float().mean()
        return {"loss": loss, "accuracy": accuracy, "spread": spread(queries[: len(rows)])}

    @torch.no_grad()
    def after_step(self, backbone: Backbone, step: int) -> None:
        """The key network follows, ever more slowly: its momentum rises to 1 by half a cosine."""
        momentum = rising(step, self.corpus.steps, self.settings.momentum)
        follow(self.key_backbone, backbone, momentum)
        follow(self.key_head, self.head, momentum)
