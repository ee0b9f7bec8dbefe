"""Anomaly detection: a density on the features of normal images, of a frozen backbone or one trained on by pasting."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from carina.data.batches import Batch
from carina.data.splits import patient_folds
from carina.errors import CarinaError
from carina.finetune.recipe import FinetuneRecipe, ScorerSettings
from carina.models.backbones import Backbone, resize_images
from carina.models.pasting import PastingHead, pasting_loss, pasting_views
from carina.models.scorers import SCORERS
from carina.training.engine import Task

CROSS_FOLDS = 5


class Pasting(Task):
    """Training on normal images alone: tell each from itself with a lesion pasted in."""

    def __init__(self, backbone: Backbone, recipe: FinetuneRecipe):
        super().__init__()
        self.backbone = backbone
        self.head = PastingHead(backbone.dimension, recipe.pasting, recipe.seed)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        whole, pasted, _ = pasting_views(batch.images, batch.masks, batch.draws.part("anomaly"))
        size = self.backbone.spec.size
        return pasting_loss(self.backbone, self.head, resize_images(whole, size), resize_images(pasted, size))


def fit_scorer(features: np.ndarray, settings: ScorerSettings) -> nn.Module:
    options = {k: v for k, v in settings.model_dump().items() if k != "name"}
    return SCORERS[settings.name].fit(features, **options)


@torch.no_grad()
def distances(scorer: nn.Module, features: np.ndarray) -> np.ndarray:
    return scorer(torch.from_numpy(features.astype(np.float32))).double().numpy()


def cross_fitted_distances(
    features: np.ndarray, patients: list[str], settings: ScorerSettings, seed: int
) -> np.ndarray:
    """Distances (N,) of every normal from a scorer fitted without its patient's fold.

    Scores of the images that were fitted are useless for a threshold: with 684 normals and 512 features a nominal 5 %
    false-positive rate on them was 95 % on new normals.
    """
    folds = min(CROSS_FOLDS, len(set(patients)))
    if folds < 2:
        raise CarinaError("a threshold needs normals of at least two patients; add validation rows or patients")
    number = patient_folds(patients, folds, seed)
    result = np.empty(len(features))
    for fold in range(folds):
        result[number == fold] = distances(fit_scorer(features[number != fold], settings), features[number == fold])
    return result
