"""Optimizers, the learning-rate rule and the schedule."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from carina.recipes import Section


class OptimSettings(Section):
    """Values and their meaning stand in the default.yaml of the stage."""

    name: Literal["sgd", "adamw"]
    lr: Annotated[float, Field(gt=0)]
    lr_rule: Literal["fixed", "linear", "sqrt"]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup: Annotated[float, Field(ge=0, lt=1)]
    final_lr: Annotated[float, Field(ge=0, le=1)]
    clip: Annotated[float, Field(gt=0)] | None


def base_rate(settings: OptimSettings, batch_size: int) -> float:
    """The peak learning rate: `lr` counts for 256 images a step and grows linearly or by the root, unless fixed."""
    power = {"fixed": 0.0, "linear": 1.0, "sqrt": 0.5}[settings.lr_rule]
    return settings.lr * (batch_size / 256) ** power


def rate_at(step: int, steps: int, peak: float, settings: OptimSettings) -> float:
    """Linear warm-up over the share `warmup` of all steps, then half a cosine down to `final_lr` times the peak."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    low = peak * settings.final_lr
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(module: nn.Module, settings: OptimSettings, peak: float) -> torch.optim.Optimizer:
    """Weights decay; biases and the parameters of normalization (one dimension or less) do not."""
    decay = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=peak, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=peak, betas=(settings.momentum, 0.999))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors; parameters are numbered in the order of the groups."""
    tensors = {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{number}.{name}"] = torch.as_tensor(value)
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        # Adam counts its steps in a tensor that stays on the CPU
        target = value if name == "step" else value.to(parameter.device).to(memory_format=_format(value))
        optimizer.state[parameter][name] = target.clone()


def _format(value: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if value.ndim == 4 else torch.contiguous_format
