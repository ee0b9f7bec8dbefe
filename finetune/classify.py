"""Multi-label classification: a probe on frozen features, or the whole network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from carina.data.batches import Batch
from carina.data.splits import patient_folds
from carina.errors import CarinaError
from carina.finetune.losses import masked_bce
from carina.finetune.recipe import FinetuneRecipe, ProbeSettings
from carina.imaging.views import make_view
from carina.metrics.ranking import auroc
from carina.models.backbones import Backbone
from carina.models.heads import head_from_arrays, linear_head
from carina.training.engine import Task


class Classification(Task):
    """Backbone and linear head under masked binary cross entropy."""

    def __init__(self, backbone: Backbone, recipe: FinetuneRecipe):
        super().__init__()
        self.backbone, self.recipe = backbone, recipe
        self.head = linear_head(backbone.dimension, len(recipe.labels), recipe.seed)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        size = self.backbone.spec.size
        view = make_view(batch.images, batch.draws.part("classify"), self.recipe.views, size)
        return {"loss": masked_bce(self.head(self.backbone(view)), batch.targets)}


def _fit(features: np.ndarray, target: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Coefficients of a logistic regression on standardized features, folded back to the features as they are."""
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=strength, max_iter=2000).fit(scaler.transform(features), target)
    weight = model.coef_[0] / scaler.scale_
    return weight, float(model.intercept_[0] - weight @ scaler.mean_)


def _two_classes(target: np.ndarray) -> bool:
    return len(np.unique(target)) == 2


def cross_fitted(features: np.ndarray, target: np.ndarray, folds: np.ndarray, strength: float) -> np.ndarray:
    """Scores (N,) of every row from a fit without its fold; NaN where the other folds hold one class only."""
    scores = np.full(len(target), np.nan)
    for fold in np.unique(folds):
        rest = folds != fold
        if _two_classes(target[rest]):
            weight, bias = _fit(features[rest], target[rest], strength)
            scores[~rest] = features[~rest] @ weight + bias
    return scores


def probe(
    features: np.ndarray,
    targets: np.ndarray,
    patients: list[str],
    labels: list[str],
    settings: ProbeSettings,
    seed: int,
) -> tuple[nn.Linear, dict[str, Any], np.ndarray]:
    """A linear head (L2-regularized logistic regression, one a label) on features (N, D), targets (N, L) with NaN.

    The strength is chosen per label by the AUROC of cross-fitted scores, patient-grouped, inside these rows alone.
    Returns the head, what was chosen, and the cross-fitted probabilities (N, L) at the chosen strength.
    """
    features = features.astype(np.float64)
    weights, biases, chosen = [], [], {}
    crossed = np.full(targets.shape, np.nan)
    for column, label in enumerate(labels):
        known = ~np.isnan(targets[:, column])
        x, y = features[known], targets[known, column]
        if not _two_classes(y):
            raise CarinaError(
                f"the training rows hold one class only of '{label}' ({int((y == 1).sum())} positive, "
                f"{int((y == 0).sum())} negative); give more patients or leave the label out"
            )
        own = [patient for patient, keep in zip(patients, known) if keep]
        strength, estimate = settings.strengths[len(settings.strengths) // 2], None
        if len(set(own)) >= settings.folds:
            folds = patient_folds(own, settings.folds, seed)
            trials = []
            for candidate in settings.strengths:
                scores = cross_fitted(x, y, folds, candidate)
                use = ~np.isnan(scores)
                value = auroc(y[use], scores[use]) if _two_classes(y[use]) else np.nan
                trials.append((value, candidate, scores))
            valid = [trial for trial in trials if not np.isnan(trial[0])]
            if valid:
                estimate, strength, scores = max(valid, key=lambda trial: (round(trial[0], 4), -trial[1]))
                crossed[known, column] = 1 / (1 + np.exp(-scores))
        weight, bias = _fit(x, y, strength)
        weights.append(weight)
        biases.append(bias)
        chosen[label] = {
            "strength": strength,
            "cross_fitted_auroc": None if estimate is None else round(float(estimate), 4),
        }
    return head_from_arrays(np.stack(weights), np.array(biases)), chosen, crossed
