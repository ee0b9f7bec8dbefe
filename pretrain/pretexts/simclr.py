"""SimCLR (Chen et al., arXiv 2002.05709): a view must find its twin among the views of all other patients.

Differences from the paper: other images of the same patient are no negatives; the views are those that keep the meaning
of a radiograph. Negatives come from all ranks.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from lightly.models.modules import SimCLRProjectionHead
from pydantic import Field

from carina.data.batches import Batch
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext, spread
from carina.recipes import Section
from carina.training.ranks import gather, own_rows


class SimCLRSettings(Section):
    weight: float
    temperature: Annotated[float, Field(gt=0)]
    dimension: Annotated[int, Field(ge=2)]
    exclude: Literal["image", "study", "patient"]


def nt_xent(
    first: torch.Tensor, second: torch.Tensor, owners: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalized temperature-scaled cross entropy of this rank's pairs within the joined batch of all ranks.

    first, second: (B, D) float32 of unit length, the two views; owners: (B,) int64, entries of one owner are no negatives
    of each other. Returns the mean over the 2 B anchors (0 for an anchor without negatives) and the share of anchors to
    which no candidate is nearer than the twin.
    """
    candidates = gather(torch.stack([first, second], dim=1)).transpose(0, 1).flatten(0, 1)
    everyone = gather(owners)
    rows = own_rows(len(first), first.device)
    twin = torch.cat([rows + len(everyone), rows])
    ruled_out = (owners[:, None] == everyone[None, :]).repeat(2, 2)  # an anchor itself among them
    ruled_out[torch.arange(len(twin), device=twin.device), twin] = False
    logits = (torch.cat([first, second]) @ candidates.T / temperature).masked_fill(ruled_out, float("-inf"))
    accuracy = (logits.detach().argmax(dim=1) == twin).float().mean()
    return F.cross_entropy(logits, twin), accuracy


class SimCLR(Pretext):
    healthy = (
        "the loss starts near log(2 x batch_size) and falls for the whole run, ever more slowly, while accuracy climbs; "
        "flat near its start means no learning"
    )
    remedy = "lower optim.lr, raise pretexts.simclr.temperature, or raise batch_size (more negatives)"

    def __init__(self, backbone: Backbone, settings: SimCLRSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        self.needs_images(2, "simclr finds its negatives in the batch")
        with seeded(corpus.seed, "simclr head"):
            self.head = SimCLRProjectionHead(backbone.dimension, backbone.dimension, settings.dimension)

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair(batch, "simclr first", "simclr second")

    def loss(
        self, backbone: Backbone, views: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> dict[str, torch.Tensor]:
        """NT-Xent; both views pass the networks as one batch, as in the paper."""
        embedding = self.head(backbone(torch.cat(views)))
        with torch.autocast(embedding.device.type, enabled=False):
            first, second = F.normalize(embedding.float(), dim=1).chunk(2)
            owners = batch.groups[self.settings.exclude]
            loss, accuracy = nt_xent(first, second, owners, self.settings.temperature)
        return {"loss": loss, "accuracy": accuracy, "spread": spread(first)}
