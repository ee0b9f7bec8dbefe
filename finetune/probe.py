"""The linear probe: L2-regularized logistic regressions on frozen features, all labels, folds and strengths in one sweep.

The objective of one fit is ||w||^2 / 2 + C * (sum of log-losses), the intercept free, on standardized features: what
scikit-learn's LogisticRegression minimizes. All fits share the features, so each step is a matrix product for all of them:

* The features are turned into the basis of their principal axes, which changes neither scores nor penalty, and where
  images are fewer than features leaves as many numbers an image as there are images. There the Hessian of every fit is
  nearly diagonal: F' diag(s) F is close to mean(s) * diag(eigenvalues) (exactly so for equal s; Boehning 1992 bounds it
  likewise by s = 1/4), which preconditions all of them at no cost.
* Newton's steps by preconditioned conjugate gradients, no more exact than the step deserves (Dembo, Eisenstat and Steihaug
  1982), with backtracking; fits that have converged leave the batch.
* Strengths are passed from strong to weak regularization; each begins where a parabola through the last three solutions
  points, if that is lower than the last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import softplus

from carina.data.splits import patient_folds
from carina.errors import CarinaError
from carina.finetune.recipe import ProbeSettings
from carina.metrics.ranking import auroc
from carina.training.engine import pick_device

PRECISE = 2**20  # features up to this many numbers are computed in double precision; larger ones leave the cache
# How far a fit may lie above its minimum by Newton's decrement, in parts of what it gained on the prevalence alone (where
# the regularization is strong) or of the objective (where it is weak and little is left of it). The square root is about
# the relative error of the scores. The first for double precision and for fits that are kept, the second for large sweeps.
FINE, COARSE = 1e-7, 1e-5
PASSES = 50  # over the rows that a fit may take at one strength of a large sweep
BLOCK = 256  # rows that stay in the cache between the two products that they take part in


class Axes:
    """Features (N, D), standardized and turned onto their principal axes, a column of ones behind them.

    rows: (N, R + 1), R <= min(N, D). `unfold` turns solutions back into coefficients of the features as they came.
    Constant features get coefficient 0. Raises CarinaError where a feature is no finite number.
    """

    def __init__(self, features: np.ndarray):
        if not np.isfinite(features).all():
            raise CarinaError(
                f"{int((~np.isfinite(features)).any(axis=1).sum())} of {len(features)} rows have features that are not "
                "finite numbers; the backbone may have been trained to nothing, try an earlier checkpoint"
            )
        self.precise = features.size <= PRECISE
        self.device = torch.device("cpu") if self.precise else pick_device()
        kind = np.float64 if self.precise else np.float32
        self.mean = features.mean(axis=0, dtype=np.float64)
        x = (features - self.mean).astype(kind)
        self.scale = np.sqrt(np.einsum("nd,nd->d", x, x, dtype=np.float64) / len(x))
        self.constant = self.scale <= 1e-6 * np.abs(self.mean)
        self.scale[self.constant] = 1.0
        x[:, self.constant] = 0.0
        x = torch.from_numpy(np.divide(x, self.scale, out=x, casting="same_kind")).to(self.device)
        wide = x.shape[0] < x.shape[1]
        values, axes = torch.linalg.eigh(x.double() @ x.double().T if wide else x.T @ x)
        if wide:  # the others span no direction in which images differ
            kept = values > 1e-12 * values[-1].clamp(min=1e-300)
            axes = x.T @ (axes[:, kept] / values[kept].sqrt()).to(x.dtype)
        self.axes = axes
        self.rows = torch.cat([x @ axes, x.new_ones(len(x), 1)], dim=1)
        self.spread = (self.rows * self.rows).sum(dim=0)

    def unfold(self, solutions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Solutions (P, R + 1) -> weights (P, D) and biases (P,), float64."""
        weight = (solutions[:, :-1] @ self.axes.T).double().cpu().numpy() / self.scale
        weight[:, self.constant] = 0.0
        return weight, solutions[:, -1].double().cpu().numpy() - weight @ self.mean


class Fits:
    """P logistic regressions on the rows of `axes`: targets (P, N) in [0, 1], used (P, N) says which rows each one sees."""

    def __init__(self, axes: Axes, targets: np.ndarray, used: np.ndarray, tolerance: float | None = None):
        self.axes, self.tolerance = axes, tolerance or (FINE if axes.precise else COARSE)
        like = {"dtype": axes.rows.dtype, "device": axes.device}
        self.positive = torch.from_numpy(np.where(used, targets, 0.0)).to(**like)
        self.negative = torch.from_numpy(np.where(used, 1.0 - targets, 0.0)).to(**like)
        positives, negatives = (part.sum(dim=1, dtype=torch.float64) for part in (self.positive, self.negative))
        self.prevalence_logits = torch.log(positives.clamp(min=1e-6) / negatives.clamp(min=1e-6))
        self.unfitted = self._losses(self.prevalence_logits[:, None].to(axes.rows.dtype).expand_as(self.positive))

    def sweep(self, strengths: Sequence[float]) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
        """(strength C, solutions (P, R + 1), logits (P, N) of all rows) for ascending strengths.

        On many rows a fit that is hardly regularized and nearly separable may be left before its minimum: the next
        strength goes on from there, and `finish` from any.
        """
        axes, past = self.axes, []
        start = axes.rows.new_zeros(len(self.positive), axes.rows.shape[1])
        start[:, -1] = self.prevalence_logits
        for strength in sorted(set(strengths)):
            starts = [start]
            if len(past) > 1:
                places = np.log([*(place for place, _ in past), strength])
                others = [(places[-1] - np.delete(places[:-1], i)) / (own - np.delete(places[:-1], i))
                          for i, own in enumerate(places[:-1])]  # fmt: skip
                starts.append(sum(float(np.prod(o)) * solution for o, (_, solution) in zip(others, past)))
            passes = None if axes.precise else PASSES
            start, logits = self._solve(axes.rows.new_full((len(start),), strength), starts, passes)
            past = [*past, (strength, start)][-3:]
            yield strength, start, logits

    def finish(self, strengths: np.ndarray, solutions: torch.Tensor) -> torch.Tensor:
        """The minima (P, R + 1) for one strength a fit, from solutions that are near."""
        return self._solve(solutions.new_tensor(strengths), [solutions], None)[0]

    def _losses(self, logits: torch.Tensor, fits: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """(P,) float64 sums of log-losses; both classes by themselves, because a difference would lose the small ones."""
        parts = self.positive[fits] * softplus(-logits) + self.negative[fits] * softplus(logits)
        return parts.sum(dim=1, dtype=torch.float64)

    def _solve(
        self, strengths: torch.Tensor, starts: list[torch.Tensor], passes: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The minima from the better of the starts, a fit at a time; their logits. Objectives are divided by C."""
        rows = self.axes.rows
        ridge = (1 / strengths)[:, None].repeat(1, rows.shape[1])
        ridge[:, -1] = 0

        def penalty(w: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
            return 0.5 * (ridge * w * w).sum(dim=1, dtype=torch.float64)

        w, z = starts[0].clone(), starts[0] @ rows.T
        value = self._losses(z) + penalty(w, ridge)
        for other in starts[1:]:
            logits = other @ rows.T
            found = self._losses(logits) + penalty(other, ridge)
            better = found < value
            w[better], z[better], value[better] = other[better], logits[better], found[better]
        slack = 16 * torch.finfo(rows.dtype).eps  # below it a rise of the objective is rounding
        live = torch.arange(len(w), device=w.device)
        left = math.inf if passes is None else passes
        while len(live) and left > 0:
            here, own = z[live], ridge[live]
            up, down = torch.sigmoid(here), torch.sigmoid(-here)
            gradient = (self.negative[live] * up - self.positive[live] * down) @ rows + own * w[live]
            curvature = (self.positive[live] + self.negative[live]) * up * down
            diagonal = own + self.axes.spread * curvature.mean(dim=1, keepdim=True)
            diagonal = diagonal.clamp(min=torch.finfo(rows.dtype).tiny)
            decrement = (gradient * gradient / diagonal).sum(dim=1).double()
            worth = torch.minimum(self.unfitted[live] - value[live], value[live])
            aim = self.tolerance * torch.maximum(worth, 1e-9 * value[live])
            going = decrement > aim
            live, gradient, curvature, diagonal, decrement, own, aim = (
                part[going] for part in (live, gradient, curvature, diagonal, decrement, own, aim)
            )
            if not len(live):
                break
            # as exact as the quadratic model is, but never beyond what is asked for
            goal = torch.minimum(0.1 * decrement, decrement**2 / value[live])
            goal = torch.maximum(goal, 0.1 * aim)
            limit = min(left, 2 * rows.shape[1])
            step, change, taken = self._newton(gradient, curvature, diagonal, own, decrement, goal, limit)
            left -= taken + 1
            before, slope = value[live], (gradient * step).sum(dim=1).double()
            length = rows.new_ones(len(live), 1)
            for _ in range(40):
                found = self._losses(z[live] + length * change, live) + penalty(w[live] + length * step, own)
                worse = ~(found <= before + 1e-4 * length[:, 0] * slope + slack * before)
                if not worse.any():
                    break
                length[worse] /= 2
            length[worse] = 0
            value[live] = torch.where(worse, before, found)
            w[live] += length * step
            z[live] += length * change
            live = live[before - value[live] > 0.01 * aim]  # the others are as low as rounding lets them come
        return w, z

    def _newton(
        self,
        gradient: torch.Tensor,
        curvature: torch.Tensor,
        diagonal: torch.Tensor,
        ridge: torch.Tensor,
        decrement: torch.Tensor,
        goal: torch.Tensor,
        limit: float,
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Steps (P, R + 1) that solve Newton's equations until the preconditioned residual is below `goal` (P,), the
        changes of logits (P, N) that they make, and how many passes over the rows that took."""
        rows = self.axes.rows
        steps, changes = torch.zeros_like(gradient), torch.zeros_like(curvature)
        places = torch.arange(len(gradient), device=gradient.device)
        residual = -gradient
        direction, size, goal = residual / diagonal, decrement.to(rows.dtype), goal.to(rows.dtype)
        block, taken = BLOCK if rows.device.type == "cpu" else len(rows), 0
        while taken < limit:
            taken += 1
            along, product = torch.empty_like(curvature), ridge * direction
            for first in range(0, len(rows), block):
                part = slice(first, first + block)
                along[:, part] = direction @ rows[part].T
                product.addmm_(curvature[:, part] * along[:, part], rows[part])
            rate = (size / (direction * product).sum(dim=1))[:, None]
            steps[places] += rate * direction
            changes[places] += rate * along
            residual = residual - rate * product
            scaled = residual / diagonal
            fresh = (residual * scaled).sum(dim=1)
            direction, size = scaled + (fresh / size)[:, None] * direction, fresh
            going = size > goal
            if not going.all():
                if not going.any():
                    break
                places, residual, direction, size, goal, curvature, diagonal, ridge = (
                    part[going] for part in (places, residual, direction, size, goal, curvature, diagonal, ridge)
                )
        return steps, changes, taken


def fit_many(
    features: np.ndarray, targets: np.ndarray, strengths: Sequence[float], tolerance: float | None = None
) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """(strength, weights (L, D), biases (L,)) of every strength, ascending: one logistic regression a label.

    features: (N, D). targets: (N, L) in [0, 1], NaN where a row is left out. The features are standardized over all N rows;
    coefficients are of the features as they come.
    """
    axes = Axes(features)
    used = ~np.isnan(targets.T)
    for strength, solutions, _ in Fits(axes, targets.T, used, tolerance).sweep(strengths):
        yield strength, *axes.unfold(solutions)


def _two_classes(target: np.ndarray) -> bool:
    """Certain values of both classes: soft targets are fitted, but neither count nor judge."""
    return bool((target == 1).any() and (target == 0).any())


def _fold_fits(target: np.ndarray, patients: list[str], folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows that are fitted (N,), rows that are scored (N,)) of each fold whose other folds hold both classes."""
    known = np.flatnonzero(~np.isnan(target))
    own = [patients[row] for row in known]
    if len(set(own)) < folds:
        return []
    number = np.full(len(target), -1)
    number[known] = patient_folds(own, folds, seed)
    parts = [((number >= 0) & (number != fold), number == fold) for fold in range(folds)]
    return [(rest, held) for rest, held in parts if _two_classes(target[rest])]


def probe(
    features: np.ndarray,
    targets: np.ndarray,
    patients: list[str],
    labels: list[str],
    settings: ProbeSettings,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any], np.ndarray]:
    """A logistic regression a label on features (N, D), targets (N, L) in [0, 1] with NaN where unknown.

    The strength is chosen per label by the AUROC of cross-fitted scores of certain targets (0 or 1), folds by patient,
    inside these rows alone; of equal ones the strongest regularization. Where patients are fewer than folds the middle
    strength is taken. Returns weights (L, D), biases (L,), what was chosen by label, and the cross-fitted logits (N, L) at
    the chosen strength, NaN where nothing was crossed. Raises CarinaError for a label of one class only.
    """
    fits, everything = [], []
    for column, label in enumerate(labels):
        target = targets[:, column]
        if not _two_classes(target):
            raise CarinaError(
                f"the training rows hold one class only of '{label}' ({int((target == 1).sum())} positive, "
                f"{int((target == 0).sum())} negative); give more patients or leave the label out"
            )
        everything.append(len(fits))
        fits.append((column, ~np.isnan(target), np.zeros(len(target), dtype=bool)))
        fits += [(column, rest, held) for rest, held in _fold_fits(target, patients, settings.folds, seed)]
    axes = Axes(np.asarray(features))
    columns = [column for column, _, _ in fits]
    batch = Fits(axes, targets.T[columns], np.stack([used for _, used, _ in fits]))
    middle = settings.strengths[len(settings.strengths) // 2]
    best: list[float | None] = [None] * len(labels)
    chosen = {label: {"strength": middle, "cross_fitted_auroc": None} for label in labels}
    crossed = np.full(targets.shape, np.nan)
    solutions = torch.zeros(len(labels), axes.rows.shape[1], dtype=axes.rows.dtype, device=axes.device)
    for strength, found, logits in batch.sweep(settings.strengths):
        logits = logits.double().cpu().numpy()
        for number, label in enumerate(labels):
            scores = np.full(len(targets), np.nan)
            for row, (column, _, held) in zip(logits, fits):
                if column == number:
                    scores[held] = row[held]
            certain = ~np.isnan(scores) & np.isin(targets[:, number], (0, 1))
            value = auroc(targets[certain, number], scores[certain]) if certain.any() else np.nan
            if np.isnan(value):
                if best[number] is None and strength == middle:
                    solutions[number] = found[everything[number]]
            elif best[number] is None or round(value, 4) > best[number]:
                best[number] = round(value, 4)
                solutions[number], crossed[:, number] = found[everything[number]], scores
                chosen[label] = {"strength": strength, "cross_fitted_auroc": round(float(value), 4)}
    kept = Fits(axes, targets.T, ~np.isnan(targets.T), FINE)
    solutions = kept.finish(np.array([chosen[label]["strength"] for label in labels]), solutions)
    weights, biases = axes.unfold(solutions)
    return weights, biases, chosen, crossed
