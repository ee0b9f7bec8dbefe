"""DINO (Caron et al., arXiv 2104.14294): self-distillation with no labels, for transformers and CNNs.

A student predicts from every crop how its teacher, its own running average, assigns the two global crops to prototypes.
Centering keeps the teacher from giving all images one prototype, a low temperature from giving all of them every one.
Teacher, heads and centers stand in distillation.py.
"""

from __future__ import annotations

import torch

from carina.data.batches import Batch
from carina.models.backbones import Backbone
from carina.pretrain.pretexts import Corpus, information
from carina.pretrain.pretexts.distillation import DistillationSettings, SelfDistillation, pair_entropy


class DINOSettings(DistillationSettings):
    pass


class DINO(SelfDistillation):
    healthy = (
        "the loss starts near log(prototypes) and falls slowly, in long runs not evenly, while information stays well "
        "above 0; a loss that stays at log(prototypes) or drops towards 0 while information goes to 0 is a collapse"
    )
    remedy = (
        "lower optim.lr, take fewer prototypes and a momentum of 0.99 to 0.994, keep teacher_temperature at 0.07 or less "
        "and center_momentum near 0.9"
    )

    def __init__(self, backbone: Backbone, settings: DINOSettings, corpus: Corpus):
        super().__init__("dino", backbone, settings, corpus)

    def loss(self, backbone: Backbone, views: list[torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """Cross entropy of the teacher's assignments of the global views and the student's of all others.

        information: of the teacher's centered and sharpened assignments.
        """
        whole = torch.cat(views[:2])
        with torch.no_grad():
            cosines = self.teacher_heads["image"](self.teacher_backbone(whole))
        self.collect("image", batch.scale, cosines.mean(dim=0))
        targets = self.targets(cosines, "image", batch.scale)
        features = [backbone(whole)]
        if views[2:]:
            features.append(backbone(torch.cat(views[2:])))
        logs = self.predictions(torch.cat(features), "image")
        loss = pair_entropy(targets.unflatten(0, (2, -1)), logs.unflatten(0, (len(views), -1)))
        return {"loss": loss, "information": information(targets)}
