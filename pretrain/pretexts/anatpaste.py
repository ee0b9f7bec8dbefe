"""AnatPaste (Sato et al., iScience 2023): tell a radiograph from itself with a synthetic lesion in the lungs."""

from __future__ import annotations

import torch

from carina.data.batches import Batch
from carina.models.backbones import Backbone, resize_images
from carina.models.pasting import PastingHead, PastingSettings, pasting_loss, pasting_views
from carina.pretrain.pretexts import Corpus, Pretext


class AnatPasteSettings(PastingSettings):
    weight: float
    batch_norm: bool


class AnatPaste(Pretext):
    needs_masks = True
    mixes_batch = False
    healthy = "the loss falls from 0.69 (a coin toss) towards 0.1-0.4 and accuracy climbs above 0.8"

    def __init__(self, backbone: Backbone, settings: AnatPasteSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        self.head = PastingHead(backbone.dimension, settings, corpus.seed, settings.batch_norm)

    def views(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The image and its pasted twin; whole images, because pasting needs lungs where the mask says they are."""
        whole, pasted, _ = pasting_views(batch.images, batch.masks, batch.draws.part("anatpaste"))
        size = self.corpus.size_of(batch.scale)
        return resize_images(whole, size), resize_images(pasted, size)

    def loss(self, backbone: Backbone, views: tuple[torch.Tensor, ...], batch: Batch) -> dict[str, torch.Tensor]:
        return pasting_loss(backbone, self.head, *views)
