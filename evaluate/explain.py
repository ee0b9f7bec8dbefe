"""Heat maps: where a score comes from. Anomaly maps where the scorer knows positions, Grad-CAM elsewhere."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import nn

from carina.errors import CarinaError
from carina.models.backbones import resize_images
from carina.models.features import only, sized, stages
from carina.models.heads import LinearHead, MlpHead
from carina.models.predictor import Member, map_span

POOLED = (LinearHead, MlpHead)  # what reads features that have lost their places


class _Tapped(nn.Module):
    """A member whose feature maps (B, C, h, w) pass through `taps`, one for each input size and stage that is read,
    whatever layout the network uses. Takes images that show the member's region alone."""

    def __init__(self, member: Member):
        super().__init__()
        self.member = member
        if member.head is not None:
            taps = len(member.head.channels)
        else:
            settings = member.scorer.settings
            taps = len(settings.sizes or [0]) * len(settings.layers or [0])
        self.taps = nn.ModuleList(nn.Identity() for _ in range(taps))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._logits(images) if self.member.head is not None else self._distances(images)[:, None]

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        head, backbone = self.member.head, self.member.backbone
        view = resize_images(images, backbone.spec.size)
        if isinstance(head, POOLED):
            return head([self._pooled(view, self.taps[0])])
        return head([tap(found) for tap, found in zip(self.taps, head.read(backbone, view))])

    def _distances(self, images: torch.Tensor) -> torch.Tensor:
        member, taps, parts = self.member, iter(self.taps), []
        layers = member.scorer.settings.layers
        for view in sized(member.backbone, images, member.scorer.settings):
            if layers is None:
                parts.append(self._pooled(view, next(taps)))
            else:
                parts += [next(taps)(found).mean(dim=(2, 3)) for found in stages(member.backbone, view, layers)]
        return member.scorer([torch.cat(parts, dim=1)])

    def _pooled(self, view: torch.Tensor, tap: nn.Module) -> torch.Tensor:
        backbone = self.member.backbone
        network = backbone.network
        if getattr(network, "global_pool", "") == "token" and hasattr(network, "blocks"):
            # the class token has gathered everything in the last block, behind which places count nothing
            hook = network.blocks[-1].register_forward_pre_hook(
                lambda _, given: (_through(tap, given[0], network), *given[1:])
            )
            try:
                return backbone(view)
            finally:
                hook.remove()
        return network.forward_head(_through(tap, network.forward_features(backbone.normalize(view)), network))


def _through(tap: nn.Module, features: torch.Tensor, network: nn.Module) -> torch.Tensor:
    if features.ndim == 3:  # tokens (B, N, C), class and register tokens first
        prefix = getattr(network, "num_prefix_tokens", 0)
        side = math.isqrt(features.shape[1] - prefix)
        if side * side != features.shape[1] - prefix:
            raise CarinaError("heat maps of this backbone need square token grids; use square images")
        grid = features[:, prefix:].transpose(1, 2).reshape(len(features), -1, side, side)
        tokens = tap(grid).flatten(2).transpose(1, 2)
        return torch.cat([features[:, :prefix], tokens], dim=1)
    if str(getattr(network, "output_fmt", "NCHW")).upper().endswith("NHWC"):
        return tap(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return tap(features)


def heat_maps(
    member: Member,
    images: torch.Tensor,
    column: int,
    lungs: torch.Tensor | None = None,
    span: tuple[float, float] | None = None,
) -> np.ndarray:
    """Where one score comes from, (B, S, S) float32 in [0, 1], at image size; 0 shows nothing.

    images: (B, 1, S, S) in [0, 1]. column: of the head (0 for a scorer). lungs: (B, 1, S, S) bool, where the
    member needs them. A scorer with positions gives its anomaly map between the values of `span`
    (default: those of `map_span` of these very images); the others give Grad-CAM (Selvaraju et al., ICCV 2017) through
    captum, each map scaled by its own maximum, all zeros where nothing speaks for the score.
    """
    with torch.no_grad():
        found = member.maps(images, lungs)
    if found is not None:
        values = found.float().cpu().numpy()
        dark, bright = span or map_span(values)
        return ((values - dark) / (bright - dark)).clip(0, 1).astype(np.float32)
    model = _Tapped(member).eval()
    images = only(images, lungs, member.region)
    total = torch.zeros(len(images), *images.shape[-2:], device=images.device)
    for tap in model.taps:
        with torch.enable_grad():
            part = LayerGradCam(model, tap).attribute(images, target=column, relu_attributions=True)
        total += F.interpolate(part.detach().float(), images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    top = total.amax(dim=(1, 2), keepdim=True)
    return torch.where(top > 0, total / top.clamp(min=1e-12), torch.zeros_like(total)).cpu().numpy().astype(np.float32)
