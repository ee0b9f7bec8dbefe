"""Anomaly detection: a scorer on the features of normal images, of a frozen backbone or one trained on by pasting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from carina.data.batches import Batch, with_lungs
from carina.data.labels import ABNORMAL
from carina.data.splits import patient_folds
from carina.data.store import Selection
from carina.draws import hash64
from carina.errors import CarinaError
from carina.finetune.recipe import FinetuneRecipe
from carina.metrics.ranking import auroc
from carina.models.backbones import Backbone
from carina.models.checkpoints import load_tensors
from carina.models.features import Region, only
from carina.models.pasting import NEEDS_MASKS, PastingTask
from carina.models.predictor import Member
from carina.models.scorers import SCORERS, Read, Scorer, ScorerSettings
from carina.progress import Progress
from carina.runs import Run
from carina.training.engine import Task
from carina.training.states import checkpoints, load_task_tensors

KEPT_FIFTH = 5
SMALL_PREVALENCE = 0.10  # of a pool: below it AUCp follows the true AUROC loosely


class Pasting(Task):
    """Training on normal images alone: tell each from itself with a lesion pasted in."""

    def __init__(self, backbone: Backbone, recipe: FinetuneRecipe):
        super().__init__()
        self.backbone = backbone
        self.task = PastingTask(backbone, recipe.pasting, recipe.seed)
        self.region = recipe.region
        self.fixed_norms = fixed_norms(recipe)

    def train(self, mode: bool = True) -> Pasting:
        super().train(mode)
        if self.fixed_norms:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        images = only(batch.images, batch.masks, self.region)
        return self.task(self.backbone, images, batch.masks, batch.draws.part("anomaly"), self.backbone.spec.size)


def fixed_norms(recipe: FinetuneRecipe) -> bool:
    """Whether batch norms keep the statistics that they came with; by default those of pretrained weights do.

    Statistics of a few hundred normals alone cost ImageNet features more than pasting gives: on the Kermany patient split
    they took AUCp from 0.78 to 0.70 without a single update of the weights.
    """
    return not recipe.backbone.startswith("random") if recipe.fixed_norms is None else recipe.fixed_norms


# -- what a scorer reads, and what it says ------------------------------------------------------------------------------


def region_images(selection: Selection, scale: int, region: Region, places: str, device: torch.device):
    """All rows in order: (images (B, 1, S, S) with everything outside the region black, lungs or None where neither the
    region nor the scorer's `places` need them)."""
    for _, images, lungs in with_lungs(selection, scale, device, region != "whole" or places == "lungs"):
        yield only(images, lungs, region), lungs


@torch.no_grad()
def collect(
    backbone: Backbone,
    selection: Selection,
    scale: int,
    settings: ScorerSettings,
    region: Region,
    device: torch.device,
    quiet: bool = True,
) -> Read:
    """What the scorer of `settings` reads of all rows, in full precision: a list of (N, D) or (N, D, h, w) float32."""
    backbone = backbone.to(device).eval()
    parts: list[list[np.ndarray]] = []
    with Progress("features", len(selection), unit="images", quiet=quiet) as progress:
        for images, lungs in region_images(selection, scale, region, settings.places, device):
            read = SCORERS[settings.name].read(backbone, images, settings, lungs)
            parts.append([part.cpu().numpy() for part in read])
            progress.advance(len(images))
    return [np.concatenate(columns) for columns in zip(*parts)]


def rows_of(read: Read, rows: np.ndarray) -> Read:
    return [part[rows] for part in read]


def fit_scorer(read: Read, settings: ScorerSettings) -> Scorer:
    return SCORERS[settings.name].fit(read, settings)


@torch.no_grad()
def distances(scorer: Scorer, read: Read, batch_size: int = 256) -> np.ndarray:
    """(N,) float64."""
    values = [
        scorer([torch.from_numpy(part[start : start + batch_size]) for part in read]).double().numpy()
        for start in range(0, len(read[0]), batch_size)
    ]
    return np.concatenate(values) if values else np.empty(0)


def member_images(member: Member, selection: Selection, device: torch.device):
    return region_images(selection, member.scale, member.region, member.scorer.settings.places, device)


@torch.no_grad()
def member_distances(member: Member, selection: Selection, device: torch.device) -> np.ndarray:
    """(N,) float64 of a member's scorer, nothing kept of what it reads."""
    member = member.to(device).eval()
    values = [
        member.distances(images, lungs).double().cpu().numpy()
        for images, lungs in member_images(member, selection, device)
    ]
    return np.concatenate(values) if values else np.empty(0)


@torch.no_grad()
def member_maps(member: Member, selection: Selection, device: torch.device) -> np.ndarray:
    """(N, S, S) float32 anomaly maps of a member whose scorer knows positions."""
    member = member.to(device).eval()
    parts = member_images(member, selection, device)
    return np.concatenate([member.region_maps(images, lungs).float().cpu().numpy() for images, lungs in parts])


# -- honest thresholds and selection ------------------------------------------------------------------------------------


def cross_fitted_distances(
    read: Read, patients: list[str], settings: ScorerSettings, seed: int, folds: int
) -> np.ndarray:
    """Distances (N,) of every normal from a scorer fitted without its patient's fold.

    Scores of the images that were fitted are useless for a threshold: with 684 normals and 512 features a nominal 5 %
    false-positive rate on them was 95 % on new normals.
    """
    folds = min(folds, len(set(patients)))
    if folds < 2:
        raise CarinaError("a threshold needs normals of at least two patients; add validation rows or patients")
    number = patient_folds(patients, folds, seed)
    result = np.empty(len(read[0]))
    for fold in range(folds):
        scorer = fit_scorer(rows_of(read, number != fold), settings)
        result[number == fold] = distances(scorer, rows_of(read, number == fold))
    return result


def kept_from_training(patients: list[str], seed: int) -> np.ndarray:
    """Rows (N,) bool of the fifth of the patients that `select=aucp` keeps out of the backbone's training."""
    return patient_folds(patients, KEPT_FIFTH, seed) == 0


def aucp(trained: Read, kept: Read, pool: Read, settings: ScorerSettings) -> float:
    """AUROC of normals that nothing was fitted on (negatives) against an unlabelled pool (positives), by a scorer fitted on
    the normals that the backbone was trained on; no label of the pool is used.

    It rises with the true AUROC where the pool holds abnormal images. Normals of the training must not be the negatives,
    cross-fitted or not: a backbone learns them by heart, new normals drift away from them as abnormal images do, and AUCp
    then rises while the true AUROC falls (docs/anomaly.md).
    """
    scorer = fit_scorer(trained, settings)
    scores = [distances(scorer, part) for part in (kept, pool)]
    return auroc(np.repeat([0.0, 1.0], [len(part) for part in scores]), np.concatenate(scores))


def contaminated(
    everything: Selection, normal: np.ndarray, abnormal: np.ndarray, share: float, seed: int
) -> np.ndarray:
    """Rows (N,) bool: all normals and as many abnormal images as make `share` of the whole, patient after patient in one
    drawn order, so that a smaller share is part of a larger one."""
    wanted = round(share / (1 - share) * int(normal.sum()))
    there = np.flatnonzero(abnormal)
    if wanted > len(there):
        raise CarinaError(
            f"contamination={share:g} needs {wanted} abnormal images among the rows and there are {len(there)}; give less"
        )
    patients = everything.table["patient_id"].to_numpy()[there]
    order = np.argsort([hash64("contamination", seed, patient) for patient in patients], kind="stable")
    rows = normal.copy()
    rows[there[order[:wanted]]] = True
    return rows


def checkpoint_steps(run: Run) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints that a run kept, oldest first."""
    return [(int(folder.name.removeprefix("step-")), folder) for folder in checkpoints(run)]


def load_checkpoint(task: Task, folder: Path) -> None:
    """Put the networks of a task where they were at a checkpoint."""
    load_task_tensors(task, load_tensors(folder / "task.safetensors"))


def saw(recipe: FinetuneRecipe) -> str:
    if recipe.contamination:
        return f"unlabelled, {recipe.contamination:.0%} abnormal"
    return "normals only"


def check(recipe: FinetuneRecipe) -> None:
    """What can be refused before anything is read."""
    if recipe.labels != [ABNORMAL]:
        raise CarinaError(f"anomaly detection scores '{ABNORMAL}' and takes no other labels; leave labels= out")
    if recipe.patients is not None:
        raise CarinaError("patients= counts labelled patients of classify; anomaly uses every normal of the rows")
    if recipe.scorer.name == "head" and recipe.mode == "frozen":
        raise CarinaError("scorer.name=head is the head that pasting trains; give mode=full, or another scorer")
    if recipe.scorer.places == "lungs":
        check_places(recipe)
    if recipe.region == "background" and recipe.mode == "full" and recipe.pasting.method in NEEDS_MASKS:
        raise CarinaError(
            f"{recipe.pasting.method} pastes into the lungs, which region=background leaves out; give another pasting.method"
        )
    if recipe.select == "last":
        return
    if recipe.mode == "frozen":
        raise CarinaError(f"select={recipe.select} chooses among checkpoints and mode=frozen makes none; leave it out")
    if recipe.keep_every is None:
        raise CarinaError(f"select={recipe.select} needs checkpoints to choose among; give keep_every=N steps")
    if recipe.folds is not None:
        raise CarinaError(f"select={recipe.select} needs rows of its own and folds= leaves none; give select=last")
    if recipe.select == "aucp" and not recipe.pool_rows:
        raise CarinaError("select=aucp needs unlabelled rows apart from training and test; give pool_rows=SPLIT")
    if "test" in (recipe.pool_rows if recipe.select == "aucp" else recipe.threshold_rows or "").split("+"):
        raise CarinaError(
            f"select={recipe.select} on split=test would let the test choose what it judges; name other rows"
        )
    if recipe.select == "validation" and not recipe.threshold_rows:
        raise CarinaError("select=validation needs labelled validation rows; give threshold_rows=SPLIT")


def check_places(recipe: FinetuneRecipe) -> None:
    """Refuse scorer.places=lungs where nothing knows places, or the lungs are black."""
    name = recipe.scorer.name
    if not (SCORERS[name].positions or (name == "head" and recipe.pasting.target == "map")):
        raise CarinaError(
            f"scorer.places=lungs chooses places of maps and scorer.name={name} reads none; give memory, patchcore, padim "
            "or the head of pasting.target=map, or leave it out"
        )
    if recipe.region == "background":
        raise CarinaError(
            "scorer.places=lungs judges the lungs, which region=background leaves out; leave one of them out"
        )


def pool_words(count: int, prevalence: float | None) -> list[str]:
    """What is said of the pool: its size, the prevalence that the user states, and a warning where that is small."""
    if prevalence is None:
        return [
            f"The pool holds {count} unlabelled images, the share of abnormal ones not stated (pool_prevalence=); "
            f"AUCp says little below {SMALL_PREVALENCE:.0%}"
        ]
    words = [f"The pool holds {count} unlabelled images, {prevalence:.0%} of them abnormal as stated"]
    if prevalence < SMALL_PREVALENCE:
        words.append(f"warning: below {SMALL_PREVALENCE:.0%} abnormal in the pool AUCp follows the true AUROC loosely")
    return words


def facts_of_choice(table: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The checkpoint with the greatest value, the latest among equals, and whether the choice means anything."""
    values = [row[key] for row in table]
    chosen = max(table, key=lambda row: (row[key], row["step"]))
    span = max(values) - min(values)
    return {"step": chosen["step"], key: chosen[key], "span": span, "informative": span >= 0.05}
