"""Heads on pooled features."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from carina.models.backbones import seeded


def linear_head(dimension: int, outputs: int, seed: int) -> nn.Linear:
    """A linear layer (B, D) -> (B, L) of logits, initialized from (seed, its name)."""
    with seeded(seed, "linear head"):
        head = nn.Linear(dimension, outputs)
        nn.init.zeros_(head.bias)
    return head


def head_from_arrays(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    """A linear layer from a solver's coefficients: weight (L, D), bias (L,)."""
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight.astype(np.float32)))
        head.bias.copy_(torch.from_numpy(bias.astype(np.float32)))
    return head
