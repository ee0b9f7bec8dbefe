"""SimMIM (Xie et al., arXiv 2111.09886): tell the hidden pixels of an image from the rest with one linear layer.

Transformers see a learned token in the place of hidden patches, as in the paper. Ours: a CNN, which has no patches to
replace, sees the mean intensity there; a transformer that pools by its class token shares it with every place, so that
what is exported is trained; the error is averaged image by image, so that it is the same on any number of ranks.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from carina.data.batches import Batch
from carina.imaging.views import make_view
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext
from carina.pretrain.pretexts.masking import explained, hidden_count, hooked, places, random_order, stride_of
from carina.recipes import Section

REFERENCE = 192  # px: the side for which the paper gives the size of its masks


class SimMIMSettings(Section):
    weight: float
    masked: Annotated[float, Field(gt=0, lt=1)]
    patch: Annotated[int, Field(ge=4)]


class SimMIM(Pretext):
    mixes_batch = False
    healthy = (
        "the loss falls fast while the picture's coarse layout is learned, then slowly for the whole run, and "
        "`explained` climbs from below 0; judge the backbone by fine-tuning, not by nearest neighbors"
    )
    remedy = "lower optim.lr, warm up longer, or lower pretexts.simmim.masked"

    def __init__(self, backbone: Backbone, settings: SimMIMSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        self.stride = stride_of(backbone, corpus, "simmim")
        with seeded(corpus.seed, "simmim decoder"):
            self.decoder = nn.Conv2d(backbone.dimension, self.stride**2, kernel_size=1)
            if backbone.family != "cnn":
                width = backbone.network.patch_embed.proj.out_channels
                self.mask_token = nn.Parameter(torch.empty(width).normal_(std=0.02))

    def views(self, batch: Batch) -> tuple[torch.Tensor]:
        size = self.corpus.size_of(batch.scale)
        return (make_view(batch.images, batch.draws.part("simmim view"), self.corpus.views, size),)

    def cell(self, size: int, patch: int) -> int:
        """Side in pixels of what is hidden at once: `settings.patch` as a share of the side, in whole strides of the
        network; small images, where that leaves fewer than two a side, fall back to half of them in whole patches."""
        cell = max(round(self.settings.patch / REFERENCE * size / self.stride), 1) * self.stride
        return cell if 2 * cell <= size else max(size // 2 // patch, 1) * patch

    def hidden(self, batch: Batch, size: int, patch: int) -> torch.Tensor:
        """(B, 1, size, size) bool: the pixels that are hidden."""
        cell = self.cell(size, patch)
        side = -(-size // cell)
        order = random_order(batch.draws.part("simmim mask"), side * side, batch.images.device)
        hidden = torch.zeros_like(order, dtype=torch.bool)
        hidden.scatter_(1, order[:, : hidden_count(self.settings.masked, side * side)], True)
        hidden = hidden.unflatten(1, (1, side, side)).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
        return hidden[..., :size, :size]

    def loss(self, backbone: Backbone, views: tuple[torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """Mean absolute error of hidden pixels, on intensities normalized by the corpus."""
        (images,) = views
        size, patch = images.shape[-1], backbone.patch
        hidden = self.hidden(batch, size, patch)
        if backbone.family == "cnn":
            mean = sum(backbone.spec.mean) / len(backbone.spec.mean)
            features = places(backbone, images.masked_fill(hidden, mean))
        else:

            def replace(tokens: torch.Tensor) -> torch.Tensor:  # (B, h, w, D) or (B, h * w, D)
                mask = hidden[:, 0, ::patch, ::patch].reshape(*tokens.shape[:-1], 1)
                return torch.where(mask, self.mask_token.to(tokens.dtype), tokens)

            with hooked(backbone.network.patch_embed, replace):
                features = places(backbone, images)
        prediction = F.pixel_shuffle(self.decoder(features), self.stride)[..., :size, :size].float()
        target = backbone.normalize(images)[:, :1]
        error = (prediction - target).abs() * hidden
        loss = (error.sum(dim=(1, 2, 3)) / hidden.sum(dim=(1, 2, 3))).mean()
        return {"loss": loss, "explained": explained(loss, target, hidden, 1)}
