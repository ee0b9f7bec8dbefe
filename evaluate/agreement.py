"""How far the heat maps of several models agree on one image: a map, and figures.

Models that were trained alike and look at different places give scores that look alike for different reasons; the PadChest
study of explainability (2022) therefore shows agreement beside probability. Our definitions, on that principle.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.stats import rankdata

from carina.errors import CarinaError
from carina.metrics.agreement import fleiss_kappa

TOP = 0.1  # share of the pixels that count as where a model looks


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of two maps of the same shape over their pixels, ties shared; 0 where one is constant, because
    it orders nothing."""
    ranks = [rankdata(part, axis=None) for part in (a, b)]
    ranks = [part - part.mean() for part in ranks]
    length = np.sqrt(np.prod([(part**2).sum() for part in ranks]))
    return float((ranks[0] * ranks[1]).sum() / length) if length > 0 else 0.0


def top_area(heat: np.ndarray, share: float = TOP) -> np.ndarray:
    """(H, W) bool: the pixels of a map (H, W) with its highest values, at most `share` of them unless they tie; never those
    with its lowest value, which show nothing."""
    return (heat >= np.quantile(heat, 1 - share, method="higher")) & (heat > heat.min())


def agreement_map(maps: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1]: the share of the models (M, H, W) among whose top tenth of the pixels each pixel is."""
    return np.mean([top_area(heat) for heat in _checked(maps)], axis=0)


def agreement(maps: np.ndarray) -> dict[str, float]:
    """Figures of the maps (M, H, W) that M models give of one image:

    spearman   mean over pairs of the rank correlation over pixels: 1 the same order, 0 none
    iou        mean over pairs of the intersection over union of the top areas: 1 the same, 0.05 by chance
    kappa      Fleiss' kappa, pixels read by models as top area or not: 1 the same, 0 by chance

    NaN where no model looks anywhere (iou, kappa).
    """
    maps = _checked(maps)
    areas = np.stack([top_area(heat) for heat in maps])
    pairs = list(combinations(range(len(maps)), 2))
    unions = [(areas[a] | areas[b]).sum() for a, b in pairs]
    overlaps = [(areas[a] & areas[b]).sum() / union if union else np.nan for (a, b), union in zip(pairs, unions)]
    return {
        "spearman": float(np.mean([rank_correlation(maps[a], maps[b]) for a, b in pairs])),
        "iou": float(np.mean(overlaps)),
        "kappa": fleiss_kappa(areas.reshape(len(maps), -1).T.astype(int)),
    }


def _checked(maps: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    maps = np.asarray(maps)
    if maps.ndim != 3 or len(maps) < 2:
        raise CarinaError(f"maps {maps.shape} must be (models, height, width) of two models or more")
    if not np.isfinite(maps).all():
        raise CarinaError("a heat map holds values that are no finite numbers; check the model that gave it")
    return maps
