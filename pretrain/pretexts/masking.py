"""Hidden places and features of places: what the masked and the dense methods share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from carina.draws import Draws
from carina.errors import CarinaError
from carina.models.backbones import Backbone
from carina.pretrain.pretexts import Corpus


def places(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """Features (B, D, h, w) of each place of images (B, 1, H, W), as the backbone would pool a picture of that place
    alone: what follows its pooling (norms, a last projection) is applied to every place, so that it is trained too.

    A transformer that pools by its class token gets that token added to every place: no loss on places alone would
    train what such a backbone gives frozen.
    """
    network = backbone.network
    if backbone.family == "vit":
        tokens = network.fc_norm(network.forward_features(backbone.normalize(images)))
        local = tokens[:, network.num_prefix_tokens :]
        if network.global_pool == "token":
            local = local + tokens[:, :1]
        side = round(local.shape[1] ** 0.5)
        return local.transpose(1, 2).unflatten(2, (side, side))
    maps = backbone.maps(images)
    batch, _, height, width = maps.shape
    single = maps.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]
    if getattr(network, "output_fmt", "NCHW") == "NHWC":
        single = single.permute(0, 2, 3, 1)
    return network.forward_head(single).unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)


def stride_of(backbone: Backbone, corpus: Corpus, name: str) -> int:
    """How many pixels a place stands for, at most, at the scales of the run; CarinaError where `name` does not fit."""
    check_pooling(backbone, name)
    copied, sides = copy.deepcopy(backbone).eval(), {corpus.size_of(scale) for scale in corpus.scales}
    check_sides(backbone, sides, name)
    strides = []
    for side in sides:
        with torch.no_grad():
            image = torch.zeros(1, 1, side, side, device=next(copied.parameters()).device)
            if copied.network.forward_features(copied.normalize(image)).ndim != 4 and copied.family != "vit":
                raise CarinaError(
                    f"{name} needs features with places, which {backbone.spec.name} does not give; take a CNN, a Swin or "
                    "a plain vision transformer, as in architecture=resnet18 or vit_small_patch16_224"
                )
            strides.append(-(-side // places(copied, image).shape[-1]))
    return max(strides)


def check_pooling(backbone: Backbone, name: str) -> None:
    if backbone.family == "vit" and backbone.network.attn_pool is not None:
        raise CarinaError(
            f"{name} would leave the attention that pools {backbone.spec.name} untrained; take a transformer that pools "
            "by class token or mean, as architecture=vit_small_patch16_224"
        )


def check_sides(backbone: Backbone, sides: set[int], name: str) -> None:
    patch = backbone.patch
    for side in sorted(sides):
        if side % patch or side < 2 * patch:
            raise CarinaError(
                f"{name} cannot hide patches of {patch} px in images of {side} px; give size= or scales= as a multiple "
                f"of {patch} from {2 * patch} on"
            )


@contextlib.contextmanager
def hooked(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within it, `module` gives ``change(output)`` for its output."""
    handle = module.register_forward_hook(lambda _, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def random_order(draws: Draws, count: int, device: torch.device) -> torch.Tensor:
    """(B, count) int64: a random permutation of the places of each sample."""
    return torch.from_numpy(np.argsort(draws.uniform("order", shape=(count,)), axis=1, kind="stable")).to(device)


def hidden_count(share: float, count: int) -> int:
    """How many of `count` places are hidden: the nearest to the share, but never none and never all."""
    return min(max(round(share * count), 1), count - 1)


@torch.no_grad()
def explained(loss: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor, power: int) -> torch.Tensor:
    """1 - loss / the loss of predicting the mean of the hidden `target` everywhere: 0 learned nothing, 1 knows all.

    hidden: bool, broadcasts to target. power: 1 for absolute errors, 2 for squared ones.
    """
    weight = hidden.float().expand_as(target)
    weight = weight / weight.sum()
    mean = (weight * target).sum()
    return 1 - loss.detach() / (weight * (target - mean).abs() ** power).sum().clamp(min=1e-12)
