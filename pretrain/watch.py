"""Observers beside the loss: what the features are worth while they are learned, and collapse told in words.

Nothing here changes training: the networks are looked at in evaluation mode without gradients and put back as they were,
and every draw is counter-based. docs/watching.md says what each figure means.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from sklearn.linear_model import LogisticRegression
from torch import nn

from carina.data.batches import in_order
from carina.data.labels import to_targets
from carina.data.splits import linked_patients, patient_folds
from carina.data.store import Selection, select
from carina.draws import Draws, permutation, sample_codes
from carina.errors import CarinaError
from carina.imaging.views import make_view
from carina.metrics.ranking import auroc
from carina.metrics.representation import alignment, dimension_deviation, knn_scores, rankme, uniformity
from carina.models.backbones import resize_images
from carina.pretrain.pictures import view_rows, write_curves, write_views
from carina.pretrain.verdicts import Judge
from carina.recipes import Section
from carina.runs import Run

HEALTHY, VIEWS, CURVES = "healthy", "views.png", "watch.png"
FIGURES = {
    "watch.rankme": "RankMe",
    "watch.deviation": "deviation",
    "watch.knn_auroc": "macro AUROC of neighbors",
    "watch.probe_auroc": "of the probe",
}  # those that a log line tells
LOOKS = 20  # in a run, where `every` leaves it open
FIRST_LOOKS = (25, 50, 100, 200)  # steps done; what goes wrong early is seen early, however long the run
FEWEST = 20  # images of either class that a label needs
FOLDS = 3  # of the probe, by patient
STRENGTH = 0.01  # of the probe (C), on standardized features; the same for every method and every look


class WatchSettings(Section):
    """Values and their meaning stand in configs/pretrain/default.yaml."""

    every: Annotated[int, Field(ge=1)] | None
    images: Annotated[int, Field(ge=16)]
    store: str | list[str] | None
    rows: str
    labels: list[str]
    labelled: Annotated[int, Field(ge=2 * FEWEST)]
    neighbors: Annotated[int, Field(ge=1)]
    pictures: bool


@contextlib.contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode, without gradients and in full precision; afterwards each part is as it was."""
    before = [(part, part.training) for part in module.modules()]
    device = next(module.parameters()).device
    module.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part, training in before:
            part.training = training


class Labelled:
    """Images with labels whose patients the corpus does not hold.

    selection: at most `settings.labelled` images, whole patients. labels: with at least 20 images of either class.
    targets: (N, L) of 1, 0 or NaN. patients: (N,) joined where they share a picture. left_out: labels that are too rare.
    """

    def __init__(self, settings: WatchSettings, corpus: Selection, scale: int, seed: int):
        found = select(settings.store, rows=settings.rows, scales=[scale])
        where = f"watch.store={settings.store if isinstance(settings.store, str) else ','.join(settings.store)}"
        if found.key_check != corpus.key_check:
            raise CarinaError(
                f"{where} was made under another key than the corpus, so their patients cannot be told apart; prepare "
                "one of them again with the other's key"
            )
        if (found.photometry, found.geometry) != (corpus.photometry, corpus.geometry):
            raise CarinaError(
                f"{where} and the corpus differ in photometry or geometry; prepare one of them again to match"
            )
        for column, what in (("patient_id", "patients"), ("content_hash", "pictures")):
            shared = len(set(found.table[column]) & set(corpus.table[column]))
            if shared:
                raise CarinaError(
                    f"{shared} {what} of {where} are in the corpus too; watch a split that is not trained on, as in "
                    "watch.rows=val, or leave them out of one"
                )
        names = settings.labels or found.labels
        targets = to_targets(found.targets(names))
        found, targets = self._few(found, targets, settings.labelled, seed)
        enough = ((targets == 1).sum(axis=0) >= FEWEST) & ((targets == 0).sum(axis=0) >= FEWEST)
        self.labels = [name for name, keep in zip(names, enough) if keep]
        self.left_out = [name for name, keep in zip(names, enough) if not keep]
        self.selection, self.targets = found, targets[:, enough]
        self.patients = linked_patients(found.table)
        if not self.labels or len(set(self.patients)) < FOLDS:
            raise CarinaError(
                f"{where}: none of {', '.join(names) or 'its labels'} has {FEWEST} images with and {FEWEST} without it, "
                f"of {FOLDS} patients or more, in rows={settings.rows}; choose other watch.labels or watch.rows"
            )
        self.folds = patient_folds(list(self.patients), FOLDS)

    @staticmethod
    def _few(found: Selection, targets: np.ndarray, most: int, seed: int) -> tuple[Selection, np.ndarray]:
        """Rows with a known label, of as many patients as fit into `most` images."""
        rows = np.flatnonzero(~np.isnan(targets).all(axis=1))
        owners = np.unique(linked_patients(found.table)[rows].astype(str), return_inverse=True)[1]
        counts = np.bincount(owners, minlength=1)
        order = permutation(len(counts), seed, "watch patients")
        kept = np.zeros(len(counts), dtype=bool)
        kept[order[np.cumsum(counts[order]) <= most]] = True
        rows = rows[kept[owners]] if len(rows) else rows
        return found.where(rows), targets[rows]

    def figures(self, features: np.ndarray, neighbors: int) -> dict[str, float]:
        """Macro AUROC of nearest neighbors and of a cross-fitted logistic regression on features (N, D)."""
        votes = knn_scores(features, self.targets, self.patients, neighbors)
        probe = probe_scores(features, self.targets, self.folds)
        return {
            "watch.knn_auroc": macro_auroc(self.targets, votes),
            "watch.probe_auroc": macro_auroc(self.targets, probe),
        }


def macro_auroc(targets: np.ndarray, scores: np.ndarray) -> float:
    """Mean over labels of the AUROC (N, L) -> [0, 1]; images without a score are left out."""
    targets = np.where(np.isnan(scores), np.nan, targets)
    return float(np.mean([auroc(target, score) for target, score in zip(targets.T, scores.T)]))


def probe_scores(features: np.ndarray, targets: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(N, L) decision values of an L2-regularized logistic regression that did not see the image's fold."""
    features = features.astype(np.float64)
    scores = np.full(targets.shape, np.nan)
    for fold in np.unique(folds):
        inside = folds == fold
        mean, deviation = features[~inside].mean(axis=0), features[~inside].std(axis=0)
        scaled = (features - mean) / np.where(deviation > 1e-9, deviation, 1)
        for column, target in enumerate(targets.T):
            train = ~inside & ~np.isnan(target)
            if len(np.unique(target[train])) == 2:
                model = LogisticRegression(C=STRENGTH, max_iter=1000).fit(scaled[train], target[train])
                scores[inside, column] = model.decision_function(scaled[inside])
    return scores


class Watch:
    """Looks at a run from its main process.

    task: with `backbone` (trained), `exported(which)` and `pretexts`; it is looked at here for the first time, so a
    checkpoint must not be loaded yet. corpus: the rows that are trained on. steps: of the whole run. Call `start` before the
    first step of a new run, the object itself after every step, and `finish` at the end.
    """

    def __init__(
        self,
        settings: WatchSettings,
        recipe: Any,
        corpus: Selection,
        task: Any,
        run: Run,
        device: torch.device,
        steps: int,
    ):
        self.settings, self.recipe, self.corpus, self.task = settings, recipe, corpus, task
        self.run, self.device, self.steps = run, device, steps
        self.every = settings.every or max(10, steps // LOOKS)
        self.scale, self.size = recipe.scales[0], recipe.size or recipe.scales[0]
        rows = np.sort(permutation(len(corpus), recipe.seed, "watch")[: settings.images])
        self.sample = corpus.where(rows)
        self.draws = Draws(recipe.seed, 0, sample_codes(self.sample.table["image_id"].tolist())).part("watch")
        self.labelled = Labelled(settings, corpus, self.scale, recipe.seed) if settings.store else None
        # a network in shards can be run by all ranks together only
        self.looks = recipe.parallel == "ddp"
        self.size_before = self._size() if self.looks else 0.0
        self.pretexts = dict(task.pretexts.items())
        self.judge = Judge(self.pretexts, round(recipe.optim.warmup * steps), self.figures() if self.looks else {})
        self.told: set[str] = set()
        self.verdict = HEALTHY

    def start(self) -> None:
        """Say what to expect and write views.png."""
        for name, pretext in self.pretexts.items():
            self.run.log(f"{name}: a healthy curve: {pretext.healthy}.")
        for sentence in [*self._about_labels(), *self._about(self.judge.before)]:
            self.run.log(f"watch: {sentence}")
        if self.settings.pictures:
            rows = view_rows(self.pretexts, self.corpus, self.recipe, self.device)
            write_views(self.run.folder / VIEWS, rows)

    def __call__(self, step: int, means: dict[str, float]) -> dict[str, Any]:
        """Figures and the verdict when they are due, and the verdict whenever it changes; else nothing."""
        if not self.judge.steps and step:
            self._replay(step)
        done = step + 1
        due = done % self.every == 0 or done in FIRST_LOOKS or done == self.steps
        figures: dict[str, Any] = self.figures() if due and self.looks else {}
        self.judge.add(means | figures)
        findings = self.judge.findings()
        for kind in findings.keys() - self.told:
            self.run.log(f"watch: at step {step}, {kind}: {findings[kind]}")
        self.told |= findings.keys()
        before, self.verdict = self.verdict, ", ".join(findings) or HEALTHY
        return figures | {"watch.verdict": self.verdict} if due or self.verdict != before else figures

    def _replay(self, step: int) -> None:
        """Tell the judge what happened before `step`, from metrics.jsonl."""
        for row in self.run.metrics():
            if row["step"] < step:
                self.judge.add(row)
                self.told |= self.judge.findings().keys()
        self.verdict = ", ".join(self.judge.findings()) or HEALTHY

    def finish(self) -> dict[str, Any]:
        """Write watch.png and say how it ended; returns the verdict and the last figures."""
        rows = self.run.metrics()
        if self.settings.pictures and rows:
            write_curves(self.run.folder / CURVES, rows, self.judge.before)
        last = next((row for row in reversed(rows) if "watch.rankme" in row), {})
        figures = {name.removeprefix("watch."): last[name] for name in FIGURES if name in last}
        said = "".join(f", {words} {last[name]:.3g}" for name, words in FIGURES.items() if last.get(name) is not None)
        self.run.log(f"watch: at the end {self.verdict}{said}")
        return {"verdict": self.verdict, "ever": sorted(self.told), **figures}

    def _about_labels(self) -> list[str]:
        if self.labelled is None:
            return []
        table, labels = self.labelled.selection.table, self.labelled
        said = [
            f"neighbors and probe on {len(table)} images of {table['patient_id'].nunique()} patients: "
            f"{', '.join(labels.labels)}"
        ]
        if labels.left_out:
            said.append(f"{len(labels.left_out)} labels are too rare there: {', '.join(labels.left_out)}")
        test = int((table["split"] == "test").sum())
        if test:
            said.append(
                f"{test} of these images are in split=test; settings chosen by them leave no test, give watch.rows=val"
            )
        return said

    def _about(self, before: dict[str, float]) -> list[str]:
        if not self.looks:
            return ["with parallel=fsdp only losses and what comes with them are watched, not the features"]
        said = [f"{words} {before[name]:.3g}" for name, words in FIGURES.items() if before.get(name) is not None]
        return [f"before training {', '.join(said)}"] if said else []

    # -- figures ----------------------------------------------------------------------------------------------------

    def _size(self) -> float:
        norms = torch._foreach_norm([p.detach() for p in self.task.backbone.parameters()])
        return float(torch.stack(norms).float().norm())

    def _features(self, network: nn.Module, selection: Selection, view: str | None = None) -> np.ndarray:
        """(N, D) of the rows as they are, or of an augmented view that is the same at every look."""
        parts = []
        for rows, images in in_order(selection, self.scale, self.device):
            if view is None:
                images = resize_images(images, self.size)
            else:
                draws = self.draws.select(np.arange(rows.start, rows.stop)).part(view)
                images = make_view(images, draws, self.recipe.views, self.size)
            parts.append(network(images).float().cpu().numpy())
        return np.concatenate(parts)

    def figures(self) -> dict[str, float | None]:
        """All figures of the network that would be exported now; None where one cannot be told."""
        began = time.perf_counter()
        network = self.task.exported(self.recipe.export)
        with still(network):
            plain = self._features(network, self.sample)
            first, second = (self._features(network, self.sample, view) for view in ("first", "second"))
            labelled = self._features(network, self.labelled.selection) if self.labelled else None
        found = {"watch.weights": self._size() / self.size_before}
        if all(np.isfinite(part).all() for part in (plain, first, second)):
            found |= {
                "watch.rankme": rankme(plain),
                "watch.deviation": dimension_deviation(plain),
                "watch.alignment": alignment(first, second),
                "watch.uniformity": uniformity(first),
            }
        if labelled is not None and np.isfinite(labelled).all():
            found |= self.labelled.figures(labelled, self.settings.neighbors)
        found["watch.seconds"] = time.perf_counter() - began
        return {name: round(value, 6) if math.isfinite(value) else None for name, value in found.items()}
