"""What the methods that paste share: the task of `carina.models.pasting` as a pretext."""

from __future__ import annotations

import torch

from carina.data.batches import Batch
from carina.models.backbones import Backbone
from carina.models.pasting import Method, PastingSettings, PastingTask, TaskSettings
from carina.pretrain.pretexts import Corpus, Pretext


class PastingPretextSettings(TaskSettings):
    weight: float
    batch_norm: bool


class Pasting(Pretext):
    """name: keeps the draws of one method apart from those of another. paste: how it pastes."""

    mixes_batch = False
    healthy = (
        "the loss falls from a coin toss (0.69; with three classes 1.10) towards 0.1-0.4 and accuracy climbs above 0.8, or "
        "map_error falls from 0.5 below 0.2"
    )

    def __init__(self, backbone: Backbone, settings: PastingPretextSettings, corpus: Corpus, name: str, paste: Method):
        super().__init__(backbone, settings, corpus)
        given = {key: getattr(settings, key) for key in TaskSettings.model_fields}
        self.name = name
        self.task = PastingTask(backbone, PastingSettings(method=paste, **given), corpus.seed, settings.batch_norm)
        self.needs_masks = self.task.needs_masks
        if settings.contrast > 0:
            self.mixes_batch = True
            self.needs_images(2, f"{name} with contrast finds its negatives in the batch")

    def views(self, batch: Batch) -> dict[str, list[torch.Tensor]]:
        """The image and its pasted twins, one a class; whole images, because lungs lie where the mask says they are."""
        size = self.corpus.size_of(batch.scale)
        return self.task.views(batch.images, batch.masks, batch.draws.part(self.name), size)

    def loss(self, backbone: Backbone, views: dict[str, list[torch.Tensor]], batch: Batch) -> dict[str, torch.Tensor]:
        return self.task.loss(backbone, views)
