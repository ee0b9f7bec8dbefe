"""Optimizers, the learning-rate rule, the schedules, and averaged copies."""

from __future__ import annotations

import copy
import math
from typing import Annotated, Literal

import torch
from lightly.utils.lars import LARS
from pydantic import Field
from timm.optim import param_groups_layer_decay
from torch import nn

from carina.errors import CarinaError
from carina.recipes import Section


class OptimSettings(Section):
    """Values and their meaning stand in the default.yaml of the stage."""

    name: Literal["sgd", "adamw", "lars"]
    lr: Annotated[float, Field(gt=0)]
    lr_rule: Literal["fixed", "linear", "sqrt"]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    final_weight_decay: Annotated[float, Field(gt=0)] | None
    bias_scale: Annotated[float, Field(gt=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    warmup: Annotated[float, Field(ge=0, lt=1)]
    final_lr: Annotated[float, Field(ge=0, le=1)]
    clip: Annotated[float, Field(gt=0)] | None


def base_rate(settings: OptimSettings, batch_size: int) -> float:
    """The peak learning rate: `lr` counts for 256 images a step and grows linearly or by the root, unless fixed."""
    power = {"fixed": 0.0, "linear": 1.0, "sqrt": 0.5}[settings.lr_rule]
    return settings.lr * (batch_size / 256) ** power


def rate_in_words(settings: OptimSettings, batch_size: int) -> str:
    """The peak learning rate with how it came about."""
    peak = f"{base_rate(settings, batch_size):.3g}"
    if settings.lr_rule == "fixed":
        return f"{peak} (fixed)"
    root = "" if settings.lr_rule == "linear" else "square root of "
    return f"{peak} = {settings.lr:g} x {root}{batch_size}/256 ({settings.lr_rule})"


def rate_at(step: int, steps: int, peak: float, settings: OptimSettings) -> float:
    """Linear warm-up over the share `warmup` of all steps, then half a cosine down to `final_lr` times the peak."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    low = peak * settings.final_lr
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_at(step: int, steps: int, settings: OptimSettings) -> float:
    """The weight decay, on its way to `final_weight_decay` by half a cosine where there is one (DINO, Caron et al.,
    arXiv 2104.14294)."""
    start, end = settings.weight_decay, settings.final_weight_decay
    return start if end is None else end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


def _groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weights decay; biases, the parameters of normalization (one dimension or less) and what timm names do not."""
    spared = {
        parameter
        for part in module.modules()
        if hasattr(part, "no_weight_decay")
        for name, parameter in part.named_parameters()
        if name in part.no_weight_decay()
    }
    ours = [p for p in module.parameters() if p.requires_grad]
    decay = [p for p in ours if p.ndim > 1 and p not in spared]
    plain = [p for p in ours if p.ndim <= 1 or p in spared]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def parameter_groups(module: nn.Module, settings: OptimSettings, network: nn.Module | None = None) -> list[dict]:
    """Groups for an optimizer, each with `scale`, what its learning rate is multiplied by: `bias_scale` for what does not
    decay.

    With `layer_decay` below 1 the layers of `network`, a timm network inside `module`, get layer_decay ** (layers above
    them) (BEiT, Bao et al., arXiv 2106.08254); heads keep the full rate.
    """
    if network is None or settings.layer_decay == 1:
        scales = (1.0, settings.bias_scale)
        groups = [{**g, "scale": s} for g, s in zip(_groups(module, settings.weight_decay), scales)]
        return [group for group in groups if group["params"]]
    spared = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    layered = param_groups_layer_decay(network, settings.weight_decay, spared, layer_decay=settings.layer_decay)
    groups = [{**{k: g[k] for k in ("params", "weight_decay")}, "scale": g["lr_scale"]} for g in layered]
    inside = {p for group in groups for p in group["params"]}
    for group, scale in zip(_groups(module, settings.weight_decay), (1.0, settings.bias_scale)):
        outside = [p for p in group["params"] if p not in inside]
        groups.append({"params": outside, "weight_decay": group["weight_decay"], "scale": scale})
    return [group for group in groups if group["params"]]


def make_optimizer(
    module: nn.Module, settings: OptimSettings, peak: float, network: nn.Module | None = None
) -> torch.optim.Optimizer:
    if settings.name == "lars" and not settings.weight_decay:
        raise CarinaError("lars adapts the rate of weights that decay; give optim.weight_decay above 0, as 1e-6")
    groups = parameter_groups(module, settings, network)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=peak, momentum=settings.momentum)
    if settings.name == "lars":  # You et al., arXiv 1708.03888; groups without decay keep the plain rate
        return LARS(groups, lr=peak, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=peak, betas=(settings.momentum, settings.beta2))


def averaged(model: nn.Module) -> nn.Module:
    """A copy without gradients, to be moved by `follow`."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, momentum: float, *, buffers: bool = False) -> None:
    """average = momentum * average + (1 - momentum) * model, in place, parameter by parameter; `buffers` copies those.

    In place, so that it also holds for parameters that FSDP has sharded.
    """
    torch._foreach_lerp_(
        list(average.parameters()), [parameter.detach() for parameter in model.parameters()], 1 - momentum
    )
    if buffers:
        for old, new in zip(average.buffers(), model.buffers()):
            old.copy_(new)


def rising(step: int, steps: int, start: float) -> float:
    """A momentum that rises from `start` to 1 by half a cosine over the run (BYOL, Grill et al., arXiv 2006.07733)."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * min(step / max(1, steps), 1.0)))
