"""Heat maps: where a score comes from."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import nn

from carina.errors import CarinaError
from carina.models.backbones import resize_images
from carina.models.predictor import Member


class _Tapped(nn.Module):
    """A member whose last feature map (B, C, h, w) passes through `tap`, whatever layout the network uses."""

    def __init__(self, member: Member):
        super().__init__()
        self.member = member
        self.tap = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        backbone = self.member.backbone
        network = backbone.network
        features = self._through_tap(network.forward_features(backbone.normalize(images)), network)
        pooled = network.forward_head(features)
        return self.member.head(pooled) if self.member.head is not None else self.member.scorer(pooled)[:, None]

    def _through_tap(self, features: torch.Tensor, network: nn.Module) -> torch.Tensor:
        if features.ndim == 3:  # tokens (B, N, C), class and register tokens first
            prefix = getattr(network, "num_prefix_tokens", 0)
            side = math.isqrt(features.shape[1] - prefix)
            if side * side != features.shape[1] - prefix:
                raise CarinaError("heat maps of this backbone need square token grids; use square images")
            grid = features[:, prefix:].transpose(1, 2).reshape(len(features), -1, side, side)
            tokens = self.tap(grid).flatten(2).transpose(1, 2)
            return torch.cat([features[:, :prefix], tokens], dim=1)
        last = getattr(network, "output_fmt", "NCHW")
        if str(last).upper().endswith("NHWC"):
            return self.tap(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.tap(features)


def heat_maps(member: Member, images: torch.Tensor, column: int) -> np.ndarray:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of one score through captum, at image size.

    images: (B, 1, S, S) in [0, 1]. column: of the head (0 for a scorer). Returns (B, S, S) float32, each map scaled to
    [0, 1] by its own maximum; all zeros where nothing speaks for the score.
    """
    model = _Tapped(member).eval()
    sized = resize_images(images, member.backbone.spec.size)
    with torch.enable_grad():
        maps = LayerGradCam(model, model.tap).attribute(sized, target=column, relu_attributions=True)
    maps = F.interpolate(maps.detach(), images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    top = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(top > 0, maps / top.clamp(min=1e-12), torch.zeros_like(maps)).cpu().numpy().astype(np.float32)
