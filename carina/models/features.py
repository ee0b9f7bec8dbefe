"""What a scorer reads of an image: pooled features or maps, of chosen stages and input sizes, of the whole image, the lungs
or the background."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from carina.errors import CarinaError
from carina.models.backbones import Backbone, resize_images
from carina.recipes import Section

Region = Literal["whole", "lungs", "background"]


class FeatureSettings(Section):
    """layers: stages of the network, the first is 1 (null: the last features that it gives). sizes: sides in pixels at which
    images enter (null: the backbone's own)."""

    layers: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None
    sizes: Annotated[list[Annotated[int, Field(ge=16)]], Field(min_length=1)] | None


def only(images: torch.Tensor, lungs: torch.Tensor | None, region: Region) -> torch.Tensor:
    """Images (B, 1, S, S) with everything outside the region black. lungs: (B, 1, S, S) bool; not needed for `whole`."""
    if region == "whole":
        return images
    if lungs is None:
        raise CarinaError(f"region={region} needs lung masks; prepare the store with lungs=true")
    return images * (lungs if region == "lungs" else ~lungs)


def stages(backbone: Backbone, images: torch.Tensor, layers: list[int] | None) -> list[torch.Tensor]:
    """The maps (B, D, h, w) of the stages, images already at the size that enters the network."""
    if layers is None:
        return [backbone.maps(images)]
    network = backbone.network
    there = len(getattr(network, "feature_info", None) or [])
    if not hasattr(network, "forward_intermediates") or max(layers) > there:
        raise CarinaError(
            f"{backbone.spec.name} has {there} stages to read and layers={layers} names others; choose among 1 to {there}, "
            "or leave layers out"
        )
    found = network.forward_intermediates(
        backbone.normalize(images), indices=[layer - 1 for layer in layers], intermediates_only=True, output_fmt="NCHW"
    )
    by_layer = dict(zip(sorted(set(layers)), found))
    return [by_layer[layer] for layer in layers]


def sized(backbone: Backbone, images: torch.Tensor, settings: FeatureSettings) -> list[torch.Tensor]:
    """The images (B, 1, S, S) at every size that enters the network."""
    return [resize_images(images, size) for size in settings.sizes or [backbone.spec.size]]


def read_pooled(backbone: Backbone, images: torch.Tensor, settings: FeatureSettings) -> torch.Tensor:
    """(B, D): the network's own pooled features, or the means of the stages' maps; those of several sizes side by side."""
    parts: list[torch.Tensor] = []
    for view in sized(backbone, images, settings):
        if settings.layers is None:
            parts.append(backbone(view))
        else:
            parts += [found.mean(dim=(2, 3)) for found in stages(backbone, view, settings.layers)]
    return torch.cat(parts, dim=1).float()


def read_maps(backbone: Backbone, images: torch.Tensor, settings: FeatureSettings) -> list[torch.Tensor]:
    """One map (B, D, h, w) a size: the stages' maps resized to the finest of them and stacked."""
    result = []
    for view in sized(backbone, images, settings):
        found = [part.float() for part in stages(backbone, view, settings.layers)]
        side = max(part.shape[-2:] for part in found)
        found = [
            part if part.shape[-2:] == side else F.interpolate(part, side, mode="bilinear", align_corners=False)
            for part in found
        ]
        result.append(torch.cat(found, dim=1))
    return result
