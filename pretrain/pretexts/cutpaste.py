"""CutPaste (Li et al., arXiv 2104.04015): tell a radiograph from itself with a piece of it pasted elsewhere.

It needs no lungs. `3way` tells upright rectangles and thin scars apart as well, the paper's best.
"""

from __future__ import annotations

from typing import Literal

import torch

from carina.data.batches import Batch
from carina.models.backbones import Backbone, resize_images
from carina.models.pasting import PastingHead, PastingSettings, cutpaste_views, pasting_loss
from carina.pretrain.pretexts import Corpus, Pretext


class CutPasteSettings(PastingSettings):
    weight: float
    kind: Literal["normal", "scar", "union", "3way"]
    batch_norm: bool


class CutPaste(Pretext):
    mixes_batch = False
    healthy = (
        "the loss falls from a coin toss (0.69; with three classes 1.10) towards 0.1-0.4 and accuracy climbs above 0.8"
    )

    def __init__(self, backbone: Backbone, settings: CutPasteSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        classes = 3 if settings.kind == "3way" else 2
        self.head = PastingHead(backbone.dimension, settings, corpus.seed, settings.batch_norm, classes)

    def views(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The image and its pasted twins, one a class, pasted at the store's scale."""
        views = cutpaste_views(batch.images, batch.draws.part("cutpaste"), self.settings.kind)
        size = self.corpus.size_of(batch.scale)
        return tuple(resize_images(view, size) for view in views)

    def loss(self, backbone: Backbone, views: tuple[torch.Tensor, ...], batch: Batch) -> dict[str, torch.Tensor]:
        return pasting_loss(backbone, self.head, *views)
