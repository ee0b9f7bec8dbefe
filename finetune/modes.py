"""Which parameters of a backbone move: all of them, those of its last blocks, or low-rank changes of its attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from carina.errors import CarinaError
from carina.models.backbones import Backbone, seeded

if TYPE_CHECKING:
    from carina.finetune.recipe import LoraSettings

# Ends of the names of timm's classes of repeated parts.
BLOCKS = (
    "Block",
    "Bottleneck",
    "DenseLayer",
    "InvertedResidual",
    "DepthwiseSeparableConv",
    "UniversalInvertedResidual",
)
PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "proj")


def blocks(backbone: Backbone) -> list[list[str]]:
    """Names of the parameters of each block, first to last, in timm's order of layers; what comes behind the last block
    (a norm, a last convolution) belongs to it, what comes before the first (the stem) to none."""
    network = backbone.network
    if not hasattr(network, "group_matcher"):
        raise CarinaError(
            f"timm does not know the blocks of {backbone.spec.name}; give mode=full, or another architecture"
        )
    groups = list(group_parameters(network, network.group_matcher(coarse=False)).values())
    repeated = tuple(f"{name}." for name, part in network.named_modules() if type(part).__name__.endswith(BLOCKS))
    found: list[list[str]] = []
    for group in groups[1:]:
        if not repeated or any(name.startswith(repeated) for name in group):
            found.append(list(group))
        elif found:
            found[-1] += group
    return found


def train_last(backbone: Backbone, count: int) -> None:
    """Freeze all but the last `count` blocks and what comes behind them."""
    known = blocks(backbone)
    if count > len(known):
        raise CarinaError(
            f"{backbone.spec.name} has {len(known)} blocks, blocks={count} asks for more; give at most {len(known)}, or "
            "mode=full"
        )
    moving = {name for block in known[-count:] for name in block}
    for name, parameter in backbone.network.named_parameters():
        parameter.requires_grad_(name in moving)


def rest_frozen_norms(backbone: Backbone) -> None:
    """Batch norms whose parameters do not move keep their statistics too."""
    for module in backbone.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


@torch.no_grad()
def _projections(backbone: Backbone) -> list[str]:
    """Names of the attention's linear layers that a forward pass calls as modules: some networks of timm take the weight
    out of the layer instead, where a change beside it would do nothing."""
    called: list[str] = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, part in backbone.network.named_modules()
        if isinstance(part, nn.Linear) and name.split(".")[-1] in PROJECTIONS and "attn" in name
    ]
    training = backbone.training
    backbone.eval()(torch.zeros(1, 1, backbone.spec.size, backbone.spec.size, device=backbone.mean.device))
    backbone.train(training)
    for hook in hooks:
        hook.remove()
    return called


def add_lora(backbone: Backbone, settings: LoraSettings, seed: int) -> None:
    """Freeze the network and lay low-rank changes beside its attention's projections (Hu et al., ICLR 2022, arXiv
    2106.09685), by peft; at first they change nothing."""
    names = _projections(backbone)
    if not any(name.endswith(("qkv", "q_proj")) for name in names):
        raise CarinaError(
            f"mode=lora changes the projections of attention, and {backbone.spec.name} has none that can be changed; "
            "give a vision transformer or Swin, or mode=partial"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise CarinaError("mode=lora needs the package peft; pip install 'carina-cxr[lora]'") from None
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names, bias="none"
    )
    backbone.network.requires_grad_(False)
    with seeded(seed, "lora"):
        inject_adapter_in_model(config, backbone.network)


@torch.no_grad()
def merge_lora(backbone: Backbone) -> None:
    """Add the low-rank changes to the weights, so that the network is timm's plain one again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = backbone.network
    for name, part in list(network.named_modules()):
        if isinstance(part, BaseTunerLayer):
            part.merge()
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, part.get_base_layer())
    network.requires_grad_(True)
