"""MAE (He et al., arXiv 2111.06377): a vision transformer sees a quarter of the patches, a small decoder the rest.

Differences from the paper: the decoder's positions follow the actual grid, so that one decoder serves every scale;
the last norm is applied where timm keeps it, so that what is exported is trained however it pools.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import nn

from carina.data.batches import Batch
from carina.errors import CarinaError
from carina.imaging.views import make_view
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext
from carina.pretrain.pretexts.masking import (
    check_pooling,
    check_sides,
    explained,
    hidden_count,
    hooked,
    random_order,
)
from carina.recipes import Section


class MAESettings(Section):
    weight: float
    masked: Annotated[float, Field(gt=0, lt=1)]
    width: Annotated[int, Field(ge=16)]
    depth: Annotated[int, Field(ge=1)]
    heads: Annotated[int, Field(ge=1)]
    normalize: bool


def sincos_positions(side: int, width: int) -> torch.Tensor:
    """(side * side, width): sine and cosine of row and column at width / 4 wavelengths from 2 pi to 20,000 pi."""
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(side, side, -1), line[None, :].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).float()


class Decoder(nn.Module):
    """Tokens of the visible patches -> the pixels of all patches."""

    def __init__(self, dimension: int, pixels: int, settings: MAESettings):
        super().__init__()
        width = settings.width
        self.embed = nn.Linear(dimension, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(width, settings.heads, qkv_bias=True) for _ in range(settings.depth)))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, pixels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor, order: torch.Tensor, prefix: int) -> torch.Tensor:
        """tokens (B, prefix + K, D): the first `prefix` have no place, the others stand at the first K places of
        `order` (B, N). Returns (B, N, pixels)."""
        tokens = self.embed(tokens)
        (batch, count), width = order.shape, tokens.shape[2]
        hidden = self.mask_token.to(tokens.dtype).expand(batch, count - (tokens.shape[1] - prefix), width)
        shuffled = torch.cat([tokens[:, prefix:], hidden], dim=1)
        placed = shuffled.gather(1, order.argsort(dim=1)[:, :, None].expand(-1, -1, width))
        placed = placed + sincos_positions(round(count**0.5), width).to(placed)
        tokens = self.blocks(torch.cat([tokens[:, :prefix], placed], dim=1))
        return self.pixels(self.norm(tokens[:, prefix:]))


class MAE(Pretext):
    mixes_batch = False
    healthy = (
        "the loss falls fast from about 1, then ever more slowly for the whole run, and `explained` climbs from 0 "
        "without settling; judge the backbone by fine-tuning, not by nearest neighbors"
    )
    remedy = "lower optim.lr, warm up longer, or lower pretexts.mae.masked"

    def __init__(self, backbone: Backbone, settings: MAESettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        if backbone.family != "vit":
            raise CarinaError(
                f"mae drops patches, which only a plain vision transformer allows, and {backbone.spec.name} is none; give "
                "architecture=vit_small_patch16_224, or take pretexts.simmim"
            )
        check_pooling(backbone, "mae")
        check_sides(backbone, {corpus.size_of(scale) for scale in corpus.scales}, "mae")
        if settings.width % 4 or settings.width % settings.heads:
            raise CarinaError(
                f"pretexts.mae.width={settings.width} must be a multiple of 4 and of heads={settings.heads}; give "
                f"pretexts.mae.width={-(-settings.width // (4 * settings.heads)) * 4 * settings.heads}"
            )
        with seeded(corpus.seed, "mae decoder"):
            self.decoder = Decoder(backbone.dimension, backbone.patch**2, settings)

    def views(self, batch: Batch) -> tuple[torch.Tensor]:
        size = self.corpus.size_of(batch.scale)
        return (make_view(batch.images, batch.draws.part("mae view"), self.corpus.views, size),)

    def targets(self, backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
        """(B, N, patch * patch): normalized intensities of every patch, by default by its own mean and deviation."""
        target = F.pixel_unshuffle(backbone.normalize(images)[:, :1], backbone.patch).flatten(2).transpose(1, 2)
        if not self.settings.normalize:
            return target
        variance, mean = torch.var_mean(target, dim=2, keepdim=True)
        return (target - mean) / (variance + 1e-6).sqrt()

    def loss(self, backbone: Backbone, views: tuple[torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """Mean squared error of the pixels of hidden patches."""
        (images,) = views
        network, prefix = backbone.network, backbone.network.num_prefix_tokens
        count = (images.shape[-1] // backbone.patch) ** 2
        order = random_order(batch.draws.part("mae mask"), count, images.device)
        kept = order[:, : count - hidden_count(self.settings.masked, count)]

        def drop(tokens: torch.Tensor) -> torch.Tensor:
            visible = tokens[:, prefix:].gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
            return torch.cat([tokens[:, :prefix], visible], dim=1)

        with hooked(network.patch_drop, drop):  # timm's own place for dropping patches: after the positions are added
            tokens = network.fc_norm(network.forward_features(backbone.normalize(images)))
        prediction = self.decoder(tokens, order, prefix).float()
        target = self.targets(backbone, images)
        hidden = torch.ones_like(order, dtype=torch.bool).scatter_(1, kept, False)
        error = (prediction - target).square().mean(dim=2)
        loss = (error * hidden).sum() / hidden.sum()
        return {"loss": loss, "explained": explained(loss, target, hidden[:, :, None], 2)}
