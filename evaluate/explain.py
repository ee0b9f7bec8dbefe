"""Heat maps: where a score comes from. Anomaly maps where the scorer knows positions; elsewhere Grad-CAM, attention rollout
or integrated gradients; and whether such a map depends on what the network has learned."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerGradCam
from torch import nn

from carina.draws import hash64
from carina.errors import CarinaError, nearest
from carina.evaluate.agreement import rank_correlation
from carina.imaging.views import gaussian_blur
from carina.models.backbones import resize_images
from carina.models.features import only, sized, stages
from carina.models.heads import LinearHead, MlpHead
from carina.models.predictor import Member, map_span

POOLED = (LinearHead, MlpHead)  # what reads features that have lost their places
METHODS = ("gradcam", "rollout", "integrated_gradients")
STEPS = 32  # of the integral, by Gauss-Legendre
GRAIN = 0.02  # of the side: sigma by which integrated gradients are smoothed, because single pixels say little
AT_ONCE = 64  # images that pass the network together


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
    method: str | None = None,
) -> np.ndarray:
    """Where one score comes from, (B, S, S) float32 in [0, 1], at image size; 0 shows nothing.

    images: (B, 1, S, S) in [0, 1]. column: of the head (0 for a scorer). lungs: (B, 1, S, S) bool, where the
    member needs them. A scorer with positions gives its anomaly map between the values of `span`
    (default: those of `map_span` of these very images). The others give what `method` names (default gradcam), each map
    scaled by its own maximum, all zeros where nothing speaks for the score:

    gradcam               Selvaraju et al., ICCV 2017, through captum, at the feature maps that the score is read from
    rollout               attention of a plain vision transformer, multiplied through its blocks (`rollout`)
    integrated_gradients  Sundararajan et al., ICML 2017, through captum: from a picture that is gray all over, at each
                          image's own mean, to the image (`integrated_gradients`); what speaks for the score, smoothed by
                          2 % of the side

    Raises CarinaError for a method that there is not, or that this member has no use for.
    """
    if method is not None and method not in METHODS:
        raise CarinaError(f"heat maps have no method '{method}'{nearest(method, METHODS)}; choose {', '.join(METHODS)}")
    with torch.no_grad():
        found = member.maps(images, lungs)
    if found is not None:
        if method is not None:
            name = member.scorer.settings.name
            raise CarinaError(f"the scorer {name} gives anomaly maps of its own, not {method}; leave the method out")
        values = found.float().cpu().numpy()
        dark, bright = span or map_span(values)
        return ((values - dark) / (bright - dark)).clip(0, 1).astype(np.float32)
    images = only(images, lungs, member.region)
    if method == "rollout":
        total = rollout(member, images, column)
    elif method == "integrated_gradients":
        sigma = GRAIN * images.shape[-1]
        found = integrated_gradients(member, images, column).clamp(min=0)
        total = gaussian_blur(found, torch.full((len(images),), sigma, device=images.device), sigma)[:, 0]
    else:
        total = _gradcam(member, images, column)
    top = total.amax(dim=(1, 2), keepdim=True)
    return torch.where(top > 0, total / top.clamp(min=1e-12), torch.zeros_like(total)).cpu().numpy().astype(np.float32)


def _gradcam(member: Member, images: torch.Tensor, column: int) -> torch.Tensor:
    """(B, S, S), 0 or more, of images that show the member's region alone."""
    model = _Tapped(member).eval()
    total = torch.zeros(len(images), *images.shape[-2:], device=images.device)
    for tap in model.taps:
        with torch.enable_grad():
            part = LayerGradCam(model, tap).attribute(images, target=column, relu_attributions=True)
        total += _at_size(part.detach().float(), images)
    return total


def _at_size(maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(B, 1, h, w) -> (B, S, S)."""
    return F.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def integrated_gradients(member: Member, images: torch.Tensor, column: int) -> torch.Tensor:
    """(B, 1, S, S): what every pixel adds to the score of the image over that of a picture without any structure, its sum
    over the pixels being that difference (logits, or distances), up to the error of the integral.

    images: (B, 1, S, S) that show the member's region alone. The picture to start from is the image's mean over the
    pixels that are not black, there: from a black one, air could not count, and a pneumothorax is air.
    """
    shown = images > 0
    mean = images.sum(dim=(1, 2, 3), keepdim=True) / shown.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    baseline = mean * (shown if member.region != "whole" else torch.ones_like(images))
    with torch.enable_grad():
        found = IntegratedGradients(_Tapped(member).eval()).attribute(
            images, baseline, target=column, n_steps=STEPS, internal_batch_size=max(AT_ONCE, len(images))
        )
    return found.detach().float()


@torch.no_grad()
def rollout(member: Member, images: torch.Tensor, column: int) -> torch.Tensor:
    """(B, S, S): how much of every patch reaches what the score is read from, by attention alone (Abnar and Zuidema, ACL
    2020): the product over blocks of the heads' mean attention, half of it passing by on the residual way.

    images: (B, 1, S, S) that show the member's region alone. Read at the class token, or at the mean of all patches where
    the network pools them, or as the head's own attention to the label weighs them; only the last knows the label.
    Raises CarinaError unless the network is a transformer whose every block attends to all patches.
    """
    backbone = member.backbone
    network = backbone.network
    blocks = getattr(network, "blocks", None)
    layers = [getattr(block, "attn", None) for block in blocks] if isinstance(blocks, nn.Sequential) else []
    if not layers or not all(hasattr(layer, "attn_drop") and hasattr(layer, "fused_attn") for layer in layers):
        raise CarinaError(
            f"attention rollout is for plain vision transformers, and {backbone.spec.name} is none; choose gradcam or "
            "integrated_gradients"
        )
    prefix = getattr(network, "num_prefix_tokens", 0)
    view = resize_images(images, backbone.spec.size)
    with _attention(layers) as seen:
        read = None if member.head is None else member.head.read(backbone, view)
        if read is None:
            backbone(view)
    flow = None
    for weights in seen:  # (B, heads, N, N), rows sum to 1
        mixed = (weights.float().mean(dim=1) + torch.eye(weights.shape[-1], device=weights.device)) / 2
        flow = mixed if flow is None else mixed @ flow
    spread = None if read is None else member.head.spread(read)
    if spread is not None:
        row = (spread[:, column].flatten(1)[:, None].float() @ flow[:, prefix:])[:, 0]
    elif getattr(network, "global_pool", "") == "token":
        row = flow[:, 0]
    else:
        row = flow[:, prefix:].mean(dim=1)
    patches = row[:, prefix:]
    side = math.isqrt(patches.shape[1])
    # what reaches every patch alike says nothing of places
    return _at_size((patches - patches.amin(dim=1, keepdim=True)).view(-1, 1, side, side), images)


@contextlib.contextmanager
def _attention(layers: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The attention (B, heads, N, N) of the layers, one after the other, as images pass; fused kernels do not show it."""
    seen: list[torch.Tensor] = []
    fused = [layer.fused_attn for layer in layers]
    hooks = [layer.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False
        yield seen
    finally:
        for layer, was, hook in zip(layers, fused, hooks):
            layer.fused_attn = was
            hook.remove()


def sanity(
    member: Member,
    images: torch.Tensor,
    column: int,
    lungs: torch.Tensor | None = None,
    method: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Whether heat maps depend on what was learned (Adebayo et al., NeurIPS 2018): weights are randomized from the output
    to the input, one part after the other, and the maps compared with those of the trained member.

    Returns [{"randomized": name of the last part, "similarity": mean Spearman correlation over images, "maps": (B, S, S)}],
    the trained member first ("nothing", 1). A method that passes loses its similarity; one that keeps it draws edges of
    the picture, whatever the network. The member itself is not changed. A random network may have nothing to say for the
    label: its maps are then all zeros, and their similarity counts as 0. Look at several seeds.
    """
    trained = heat_maps(member, images, column, lungs, None, method)
    rows: list[dict[str, Any]] = [{"randomized": "nothing", "similarity": 1.0, "maps": trained}]
    other = copy.deepcopy(member).eval()
    for name, part in _from_the_top(other):
        randomize(part, seed, name)
        maps = heat_maps(other, images, column, lungs, None, method)
        similarity = float(np.mean([rank_correlation(a, b) for a, b in zip(trained, maps)]))
        rows.append({"randomized": name, "similarity": similarity, "maps": maps})
    return rows


def _from_the_top(member: Member) -> list[tuple[str, nn.Module]]:
    """Parts with parameters, from the output to the input: the head, then the network's own, blocks one by one."""
    parts: list[tuple[str, nn.Module]] = []
    for name, child in member.backbone.network.named_children():
        inner = child.named_children() if isinstance(child, nn.Sequential | nn.ModuleList) else []
        parts += [(f"{name}.{number}", block) for number, block in inner] or [(name, child)]
    parts += [("head", member.head)] if member.head is not None else []
    return [(name, part) for name, part in reversed(parts) if next(part.parameters(), None) is not None]


@torch.no_grad()
def randomize(part: nn.Module, seed: int, name: str) -> None:
    """Draw every weight anew around 0, with the deviation that it had, and shuffle gains and biases, in place."""
    for key, values in part.named_parameters():
        rng = np.random.default_rng(hash64("sanity", seed, name, key))
        drawn = (
            rng.permutation(values.flatten().cpu().numpy())
            if values.ndim < 2
            else rng.normal(0, float(values.std(correction=0)), values.numel())
        )
        values.copy_(torch.from_numpy(drawn).view(values.shape))
