"""Objectives of multi-label classification.

Every loss is a mean over the known entries of a batch. It is given by what a positive and what a negative entry costs; a
target t between 0 and 1 (smooth policies, mixed images) costs t of the one and 1 - t of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from carina.finetune.recipe import LossSettings

Costs = tuple[torch.Tensor, torch.Tensor]  # (B, L) each: of a positive and of a negative
Loss = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def _masked(costs: Costs, targets: torch.Tensor) -> torch.Tensor:
    """The mean cost of the known entries of targets (B, L); NaN entries have no gradient, and 0 when nothing is known."""
    known = ~targets.isnan()
    positive, negative = (torch.where(known, cost, torch.zeros_like(cost)) for cost in costs)
    share = torch.where(known, targets, torch.zeros_like(targets)).to(positive.dtype)
    return (share * positive + (1 - share) * negative).sum() / known.sum().clamp(min=1)


def _precise(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def bce(logits: torch.Tensor, positive_weight: torch.Tensor | float = 1.0) -> Costs:
    """Binary cross entropy; positives count `positive_weight` times, one value or one a label (L,)."""
    return -F.logsigmoid(logits) * positive_weight, -F.logsigmoid(-logits)


def focal(logits: torch.Tensor, gamma: float, alpha: float | None = None) -> Costs:
    """What is right already counts less: times (1 - p of the truth) ** gamma (Lin et al., ICCV 2017, arXiv 1708.02002).

    alpha: weight of positives, that of negatives being 1 - alpha; None: 1 for both.
    """
    positive, negative = asymmetric(logits, gamma, gamma, 0.0)
    return (positive, negative) if alpha is None else (alpha * positive, (1 - alpha) * negative)


def asymmetric(logits: torch.Tensor, gamma_positive: float, gamma_negative: float, clip: float) -> Costs:
    """Focal with a power of its own for negatives, whose probability is lowered by `clip` first, so that those below it
    cost nothing (Ridnik et al., ICCV 2021, arXiv 2009.14119). All zero, it is binary cross entropy.

    The gradient is that of the formula, the powers included.
    """
    log_p, log_not = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = -log_p * torch.exp(gamma_positive * log_not)
    if clip == 0:
        return positive, -log_not * torch.exp(gamma_negative * log_p)
    shifted = torch.sigmoid(logits) - clip
    counts = shifted > 0
    # a power below 1 has no finite slope at 0
    shifted = torch.where(counts, shifted, torch.full_like(shifted, 0.5))
    cost = -torch.log1p(-shifted) * shifted**gamma_negative
    return positive, torch.where(counts, cost, torch.zeros_like(cost))


def ldam(logits: torch.Tensor, margins: torch.Tensor, sharpness: float, weights: torch.Tensor | float = 1.0) -> Costs:
    """Label-distribution-aware margins for pairs of classes, one pair a label (Cao et al., NeurIPS 2019, arXiv
    1906.07413): the logit must be right by the margin of its class.

    margins: (2, L) of negatives and positives. sharpness: what logits are multiplied by. weights: (2, L) alike.
    """
    negative, positive = margins
    off, on = weights if isinstance(weights, torch.Tensor) else (weights, weights)
    return (
        -F.logsigmoid(sharpness * (logits - positive)) * on,
        -F.logsigmoid(-sharpness * (logits + negative)) * off,
    )


def counts(targets: np.ndarray) -> np.ndarray:
    """(2, L) float64: negatives and positives among the known entries of targets (N, L); soft ones count by parts."""
    return np.stack([np.nansum(1.0 - targets, axis=0), np.nansum(targets.astype(np.float64), axis=0)])


def positive_weights(number: np.ndarray) -> np.ndarray:
    """(L,) negatives for each positive, from `counts`; 1 where a class is absent (weighted as in ChestX-ray8, Wang et
    al., CVPR 2017, arXiv 1705.02315: both classes of a label count the same in sum)."""
    return np.where((number > 0).all(axis=0), number[0] / np.maximum(number[1], 1e-12), 1.0)


def ldam_margins(number: np.ndarray, largest: float) -> np.ndarray:
    """(2, L) proportional to n ** -1/4 of each class; `largest` is that of the rarest class of all labels."""
    power = np.maximum(number, 1.0) ** -0.25
    return largest * power / power.max()


def effective_weights(number: np.ndarray, beta: float) -> np.ndarray:
    """(2, L) inverse effective numbers (1 - beta) / (1 - beta ** n) (Cui et al., CVPR 2019, arXiv 1901.05555), whose sum
    is 2 for each label."""
    inverse = (1 - beta) / (1 - beta ** np.maximum(number, 1.0))
    return 2 * inverse / inverse.sum(axis=0)


def masked_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of logits (B, L) over the known entries of targets (B, L); NaN entries have no gradient."""
    return _masked(bce(_precise(logits)), targets)


def make_loss(settings: LossSettings, targets: np.ndarray, steps: int) -> Loss:
    """The loss that the settings name: (logits (B, L), targets (B, L), step) -> scalar.

    targets: (N, L) of all training rows, from which classes are counted. steps: of the whole training; ldam_drw weighs
    the classes from its share `reweight_from` on.
    """
    number = counts(targets)
    name = settings.name

    def tensor(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(values, dtype=like.dtype, device=like.device)

    def costs(logits: torch.Tensor, step: int) -> Costs:
        if name == "weighted_bce":
            return bce(logits, tensor(positive_weights(number), logits))
        if name == "focal":
            return focal(logits, settings.gamma, settings.alpha)
        if name == "asymmetric":
            return asymmetric(logits, settings.gamma_positive, settings.gamma_negative, settings.clip)
        if name == "ldam_drw":
            margins = tensor(ldam_margins(number, settings.margin), logits)
            late = step >= settings.reweight_from * steps
            weights = tensor(effective_weights(number, settings.beta), logits) if late else 1.0
            return ldam(logits, margins, settings.sharpness, weights)
        return bce(logits)

    return lambda logits, targets, step: _masked(costs(_precise(logits), step), targets)
