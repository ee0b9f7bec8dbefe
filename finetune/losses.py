"""Objectives of multi-label classification."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def masked_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of logits (B, L) over the known entries of targets (B, L); NaN entries have no gradient.

    0 when nothing is known in the batch.
    """
    known = ~targets.isnan()
    filled = torch.where(known, targets, torch.zeros_like(targets))
    losses = F.binary_cross_entropy_with_logits(logits.float(), filled, reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)
