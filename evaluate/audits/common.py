"""What audits share: scores and features of changed images, what can be learned from features, figures with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from carina.data.batches import with_lungs
from carina.data.labels import to_targets
from carina.data.splits import linked_patients, patient_folds, patient_subset
from carina.data.store import Selection
from carina.metrics.intervals import difference, interval
from carina.metrics.resampling import Replicates, replicate
from carina.models.backbones import Backbone
from carina.models.predictor import Member, Predictor
from carina.progress import Progress
from carina.training.engine import pick_device

MACRO = "macro"
FOLDS = 5
NEAR = 0.05  # a loss of AUROC below which "nearly as well" is said, when its whole interval lies below
STRENGTH = (
    0.01  # of logistic regression (C) on standardized features of images; fixed, so that nothing is chosen by looking
)
# images (B, 1, S, S), lungs (B, 1, S, S) or None, their rows -> the same, changed
Change = Callable[[torch.Tensor, torch.Tensor | None, slice], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class AuditSettings:
    """resamples, seed: of patients, for intervals. images: audited at most; patients are drawn. run: the folder that the
    predictor came from, whose manifest says what was seen (leakage). pretrained, scratch: folders of runs, and target: the
    AUROC that they must reach (convergence; None: what the runs from scratch end at)."""

    resamples: int = 2000
    seed: int = 0
    images: int = 5000
    run: str | None = None
    pretrained: Sequence[str] = ()
    scratch: Sequence[str] = ()
    target: float | None = None


def unchanged(images: torch.Tensor, lungs: torch.Tensor | None, rows: slice) -> tuple:
    return images, lungs


@dataclass
class Audited:
    """A predictor and the rows that it is audited on."""

    predictor: Predictor
    whole: Selection
    store: str | Sequence[str]
    settings: AuditSettings
    quiet: bool

    @cached_property
    def selection(self) -> Selection:
        """The rows, or those of as many patients as fit into `settings.images`."""
        most, patients = self.settings.images, self.whole.table["patient_id"]
        if len(self.whole) <= most:
            return self.whole
        share = max(1, int(patients.nunique() * most / len(self.whole)))
        return self.whole.where(patient_subset(patients.tolist(), share, seed=self.settings.seed))

    @property
    def labels(self) -> list[str]:
        return self.predictor.labels

    @property
    def leading(self) -> Member:
        """The member whose features stand for the predictor's."""
        return self.predictor.leading(0)

    @cached_property
    def targets(self) -> np.ndarray:
        """(N, L) of 1, 0 or NaN."""
        return to_targets(self.selection.targets(self.labels)).astype(np.float64)

    @cached_property
    def patients(self) -> np.ndarray:
        return self.selection.table["patient_id"].to_numpy()

    @cached_property
    def folds(self) -> np.ndarray | None:
        """(N,) fold of every row, by patient; None with fewer patients than folds."""
        people = linked_patients(self.selection.table).tolist()
        return patient_folds(people, FOLDS, self.settings.seed) if len(set(people)) >= FOLDS else None

    @property
    def has_lungs(self) -> bool:
        return bool((self.selection.table["lungs_source"] != "none").all())

    @cached_property
    def as_it_is(self) -> np.ndarray:
        """(N, L) scores of the unchanged images."""
        return self.scores({"": unchanged})[""]

    @torch.no_grad()
    def scores(
        self, changes: Mapping[str, Change], lungs: bool = False, selection: Selection | None = None
    ) -> dict[str, np.ndarray]:
        """(N, L) scores under every change, each image read once a member. lungs: the changes need them."""
        selection, device = selection or self.selection, pick_device()
        members = self.predictor.members
        shape = (len(selection), len(self.labels))
        found = {name: [np.empty(shape) for _ in members] for name in changes}
        total = len(selection) * len(members) * len(changes)
        with Progress("audit", total, unit="images", quiet=self.quiet) as progress:
            for number, member in enumerate(members):
                member.to(device).eval()
                for rows, images, masks in with_lungs(selection, member.scale, device, member.needs_lungs or lungs):
                    for name, change in changes.items():
                        changed = member.scores(*change(images, masks, rows))
                        found[name][number][rows] = changed.double().cpu().numpy()
                        progress.advance(len(images))
        return {name: self.predictor.combine(parts) for name, parts in found.items()}

    def features(self, changes: Mapping[str, Change], lungs: bool = False) -> dict[str, np.ndarray]:
        """(N, D) pooled features of the leading member's backbone under every change."""
        member = self.leading
        return pooled(member.backbone, self.selection, member.scale, changes, lungs, self.quiet)

    def learned(
        self, features: np.ndarray, targets: np.ndarray | None = None, strength: float = STRENGTH
    ) -> np.ndarray:
        """(N, L) of what a linear model can read out of features (N, D), fitted without the image's patient; NaN in all of
        a label's rows where it cannot be fitted."""
        targets = self.targets if targets is None else targets
        if self.folds is None:
            return np.full(targets.shape, np.nan)
        return np.stack([cross_fitted(features, target, self.folds, strength) for target in targets.T], axis=1)

    def measured(self, scores: np.ndarray, targets: np.ndarray | None = None) -> Replicates:
        """AUROC of scores (N, L) on the resamples that all figures of the audit share. Labels without scores have none."""
        targets = self.targets if targets is None else targets
        known = np.where(np.isnan(scores).any(axis=0), np.nan, targets)
        return replicate(
            known, np.nan_to_num(scores)[None], self.patients, "auroc", self.settings.resamples, self.settings.seed
        )

    def figures(self, found: Replicates, whole: Replicates | None = None) -> list[dict[str, Any]]:
        """A row a label, and the mean of several first: AUROC, and how much less than `whole` it is (paired)."""
        columns: list[tuple[str, int | None]] = [(label, column) for column, label in enumerate(self.labels)]
        columns = ([(MACRO, None)] if len(columns) > 1 else []) + columns
        return [
            {
                "label": label,
                "auroc": interval(found, column).to_dict(),
                "drop": self._drop(whole, found, column),
            }
            for label, column in columns
        ]

    @staticmethod
    def _drop(whole: Replicates | None, found: Replicates, column: int | None) -> dict[str, Any] | None:
        if whole is None or not np.array_equal(whole.counts, found.counts):
            return None
        return difference(whole, found, column).to_dict()


@torch.no_grad()
def pooled(
    backbone: Backbone,
    selection: Selection,
    scale: int,
    changes: Mapping[str, Change],
    lungs: bool = False,
    quiet: bool = True,
) -> dict[str, np.ndarray]:
    """(N, D) float32 pooled features of all rows under every change."""
    device = pick_device()
    backbone.to(device).eval()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in changes}
    with Progress("features", len(selection) * len(changes), unit="images", quiet=quiet) as progress:
        for rows, images, masks in with_lungs(selection, scale, device, lungs):
            for name, change in changes.items():
                parts[name].append(backbone.features(change(images, masks, rows)[0]).float().cpu().numpy())
                progress.advance(len(images))
    return {name: np.concatenate(part) for name, part in parts.items()}


def cross_fitted(features: np.ndarray, target: np.ndarray, folds: np.ndarray, strength: float) -> np.ndarray:
    """(N,) scores by L2-regularized logistic regression on standardized features, each row by a fit without its fold.

    target: (N,) of 1, 0 or NaN (not fitted, but scored). The intercept is left out of a score: it follows the share of
    positives in the other folds, which is low where that of the own fold is high, and pooled scores of features that
    say nothing would rank below chance. All NaN where a fit would see one class only.
    """
    features = np.asarray(features, dtype=np.float64)
    known, scores = ~np.isnan(target), np.empty(len(target))
    for fold in np.unique(folds):
        own = folds == fold
        fitted = known & ~own
        if len(np.unique(target[fitted])) < 2:
            return np.full(len(target), np.nan)
        center, spread = features[fitted].mean(axis=0), features[fitted].std(axis=0)
        spread = np.where(spread > 1e-9, spread, np.inf)
        model = LogisticRegression(C=strength, max_iter=1000)
        model.fit((features[fitted] - center) / spread, target[fitted])
        scores[own] = (features[own] - center) / spread @ model.coef_[0]
    return scores


def usable(figure: Mapping[str, Any] | None) -> bool:
    """Whether a figure (`Interval.to_dict()`) may be relied on."""
    return figure is not None and figure["value"] is not None and figure["low"] is not None and figure["estimable"]


def told(figure: Mapping[str, Any], signed: bool = False) -> str:
    """A figure with its interval, in words."""
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    sign = "+" if signed else ""
    return f"{value:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def entry(name: str, sentence: str, rows: list[dict[str, Any]], curve: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"name": name, "sentence": sentence, "rows": rows, "curve": curve}


def listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
