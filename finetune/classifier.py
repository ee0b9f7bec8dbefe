"""Classification as a piece of work: a member for every scale, frozen or trained, their stack, temperature, thresholds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from carina.data.batches import in_order, intensity
from carina.data.features import read_all
from carina.data.manifest import seen_rows
from carina.data.splits import linked_patients, patient_folds
from carina.data.store import Selection
from carina.finetune.classify import Classification, train_head
from carina.finetune.probe import probe
from carina.finetune.recipe import FinetuneRecipe, few
from carina.finetune.stack import decisions, ranked, stack_weights
from carina.models.backbones import (
    Backbone,
    backbone_record,
    load_backbone,
    restore_size_norms,
)
from carina.models.heads import Head, head_from_arrays, make_head, noisy_or
from carina.models.predictor import Member, stacked
from carina.models.scales import add_size_norms
from carina.runs import Run
from carina.training.engine import Engine, pick_device
from carina.training.forecast import forecast


@dataclass
class Rows:
    """Rows with what is fitted to and what is judged by, both (N, L): targets by the recipe's policy for uncertain labels
    and truth, where uncertain is unknown."""

    selection: Selection
    targets: np.ndarray
    truth: np.ndarray

    def where(self, rows: np.ndarray) -> Rows:
        return Rows(self.selection.where(rows), self.targets[rows], self.truth[rows])

    @property
    def patients(self) -> list[str]:
        """(N,) texts; those joined by copies of one picture are one, which no fold may part."""
        return linked_patients(self.selection.table).tolist()


@dataclass
class Fit:
    """One training: its folder below the run, the scales it learns, and the rows it leaves out to score them (None: all
    rows are learned)."""

    folder: str
    scales: list[int]
    left_out: np.ndarray | None = None


class Classifier:
    """held_out: rows that nothing is fitted on, for thresholds and temperatures (None: cross-fitted training scores)."""

    def __init__(
        self,
        recipe: FinetuneRecipe,
        train: Rows,
        held_out: Rows | None,
        scales: list[int],
        size: int | None,
        quiet: bool,
    ):
        self.recipe, self.rows, self.held_out = recipe, train, held_out
        self.scales, self.size, self.quiet = scales, size, quiet
        self.frozen, self.device = recipe.mode == "frozen", pick_device()
        self.fits = [] if self.frozen else list(self._fits())
        # the first engine also says whether there are other ranks
        self.engine = None if self.frozen else self._engine(self.fits[0])
        self.main = (int(os.environ.get("RANK", 0)) if self.engine is None else self.engine.rank) == 0
        self.members: dict[int, Member] = {}
        self.crossed: dict[int, np.ndarray] = {}
        self.held: dict[int, np.ndarray] = {}
        self.chosen: dict[int, dict[str, Any]] = {}

    # -- what is trained --------------------------------------------------------------------------------------------

    def _fits(self) -> Iterator[Fit]:
        """Every training of the run. Weights of a stack need scores that no member was fitted on: without held-out rows
        each training is repeated in patient folds."""
        several = len(self.scales) > 1
        learned = [self.scales] if self.recipe.shared else [[scale] for scale in self.scales]
        for scales in learned:
            own = f"scale-{scales[0]}" if len(learned) > 1 else ""
            yield Fit(own, scales)
            for number, rows in enumerate(self._folds() if several and self.held_out is None else ()):
                yield Fit(str(Path(own) / f"fold-{number}"), scales, rows)

    def _folds(self) -> list[np.ndarray]:
        """Rows (N,) bool of each patient fold; none with fewer patients than folds."""
        count, patients = self.recipe.probe.folds, self.rows.patients
        if len(set(patients)) < count:
            return []
        folds = patient_folds(patients, count, self.recipe.seed)
        return [folds == number for number in range(count)]

    def _engine(self, fit: Fit) -> Engine:
        rows = self.rows if fit.left_out is None else self.rows.where(~fit.left_out)
        backbones = self._backbones(fit.scales)
        sizes = {scale: backbone.spec.size for scale, backbone in backbones.items()}
        backbone = backbones[max(fit.scales)]
        if len(fit.scales) > 1:  # one set of running statistics serves no scale
            add_size_norms(backbone, sorted(sizes.values(), reverse=True))
            restore_size_norms(backbone, self.recipe.backbone)
        recipe = few(self._own_recipe(fit), len(rows.selection))
        return Engine(
            Classification(backbone, recipe, rows.selection, rows.targets, sizes),
            rows.selection,
            recipe,
            scales=fit.scales,
            targets=rows.targets,
            name=f"finetune classify {fit.folder}".strip(),
            quiet=self.quiet,
        )

    def _own_recipe(self, fit: Fit) -> FinetuneRecipe:
        """What the folder of one training of several says: its scale alone."""
        if not fit.folder:
            return self.recipe
        one = {"scales": None, "scale": fit.scales[0]} if len(fit.scales) == 1 else {}
        return self.recipe.model_copy(update={**one, "out": str(Path(self.recipe.out or "") / fit.folder)})

    def _backbones(self, scales: Sequence[int]) -> dict[int, Backbone]:
        """A backbone for each scale: one network under several specs, unless it has batch norms of each size."""
        recipe, largest = self.recipe, max(scales)
        reference = f"random:{recipe.architecture}" if recipe.backbone == "random" else recipe.backbone
        mean, std = intensity(self.rows.selection, largest)
        given = {"architecture": recipe.architecture, "seed": recipe.seed, "mean": mean, "std": std}
        if len(self.scales) == 1:
            return {scales[0]: load_backbone(reference, size=self.size, **given)}
        first = load_backbone(reference, size=largest, largest=largest, **given)
        sizes = {scale: max(1, round(scale / first.patch)) * first.patch for scale in scales}
        first.check_sizes(sizes.values())
        if backbone_record(reference).get("norm_sizes"):
            return {s: load_backbone(reference, size=size, largest=largest, **given) for s, size in sizes.items()}
        return {s: Backbone(first.network, replace(first.spec, size=size)) for s, size in sizes.items()}

    def dry_run(self) -> dict[str, Any]:
        if self.engine is None:
            images = len(self.rows.selection) * len(self.scales)
            return {"mode": "frozen", "images": images, "note": "frozen features take one forward pass"}
        first = forecast(self.engine)
        if len(self.fits) == 1:
            return first
        # the other trainings are as long as the first, on maps of another size
        shares = [sum(scale**2 for scale in fit.scales) / len(fit.scales) for fit in self.fits]
        hours = first["hours"] * sum(shares) / shares[0]
        return {
            **first,
            "trainings": len(self.fits),
            "hours": round(hours, 4),
            "disk_mib": first["disk_mib"] * len(self.fits),
        }

    def barrier(self) -> None:
        """Wait until the main process has made the run's folder."""
        if self.engine is not None:
            self.engine.accelerator.wait_for_everyone()

    def fit(self, run: Run, resume: bool) -> dict[str, Any]:
        """Train what the recipe trains, on every rank; facts of the training."""
        total = {"steps": 0, "images_seen": 0, "hours": 0.0, "world_size": 1}
        if self.frozen:
            if self.main:  # frozen backbones need one process; others started by a launcher have nothing to do
                self._fit_frozen(run)
            return total
        for fit in self.fits:
            engine, self.engine = self.engine or self._engine(fit), None
            own = self._own_run(run, fit, engine, resume)
            if self.main:
                own.log(f"{engine.name}: {engine.task.trained_parameters:,} parameters are trained")
                for note in engine.task.notes:
                    own.log(note)
            facts = engine.fit(own, resume=resume)
            total = {key: facts[key] if key == "world_size" else round(total[key] + facts[key], 4) for key in total}
            if self.main:
                self._take(fit, engine)
        if len(self.fits) > 1 and self.main:
            run.note_environment(**{**engine.machine(), **total})
        return total

    def _own_run(self, run: Run, fit: Fit, engine: Engine, resume: bool) -> Run:
        if not fit.folder:
            return run
        folder = run.folder / fit.folder
        own = Run(folder, quiet=True)
        if self.main:
            there = resume and (folder / "recipe.yaml").is_file()
            own = Run.start(folder, "finetune", self._own_recipe(fit), resume=there, quiet=self.quiet)
        engine.accelerator.wait_for_everyone()
        return own

    def _take(self, fit: Fit, engine: Engine) -> None:
        """The members of a finished training, or their scores of the rows that it left out."""
        task = engine.task
        task.finish()
        for scale in fit.scales:
            spec = replace(task.backbone.spec, size=task.sizes[scale])
            member = Member(Backbone(task.backbone.network, spec), scale, task.head.float(), None).eval()
            if fit.left_out is None:
                self.members[scale] = member
                if self.held_out is not None:
                    self.held[scale] = self._scores(member, self.held_out.selection)
            else:
                crossed = self.crossed.setdefault(scale, np.full(self.rows.truth.shape, np.nan))
                crossed[fit.left_out] = self._scores(member, self.rows.selection.where(fit.left_out))

    @torch.no_grad()
    def _scores(self, member: Member, selection: Selection) -> np.ndarray:
        """(N, L) float64 probabilities, in full precision."""
        member = member.to(self.device)
        parts = [member.scores(images).cpu() for _, images in in_order(selection, member.scale, self.device)]
        member.cpu()
        return torch.cat(parts).numpy()

    # -- frozen -----------------------------------------------------------------------------------------------------

    def _fit_frozen(self, run: Run) -> None:
        recipe = self.recipe
        for scale, backbone in self._backbones(self.scales).items():
            run.log(
                f"finetune classify: frozen {backbone.spec.name} ({backbone.spec.origin}), "
                f"{len(self.rows.selection)} images, scale {scale}"
            )
            reader = make_head(recipe.head, backbone, recipe.labels, recipe.seed)
            read = self._read(backbone, self.rows.selection, scale, reader)
            head, crossed = self._fit_head(backbone, scale, read)
            if crossed is not None:
                self.crossed[scale] = crossed
            if self.held_out is not None:
                self.held[scale] = probabilities(head, self._read(backbone, self.held_out.selection, scale, head))
            self.members[scale] = Member(backbone, scale, head, None).cpu().eval()

    def _read(self, backbone: Backbone, selection: Selection, scale: int, head: Head) -> list[np.ndarray]:
        """What the head reads of all rows, (N, ...) float32, in full precision and evaluation mode."""
        settings = head.settings
        kind = {"linear": "pooled", "mlp": "pooled", "multiscale": f"stages {settings.layers}"}.get(
            settings.name, "map"
        )
        how = {"cache": self.recipe.cache, "device": self.device, "quiet": self.quiet}
        return read_all(backbone, selection, scale, head.read, kind, **how)

    def _fit_head(self, backbone: Backbone, scale: int, read: list[np.ndarray]) -> tuple[Head, np.ndarray | None]:
        """The fitted head, and cross-fitted probabilities (N, L) of the training rows where they are needed."""
        recipe, rows = self.recipe, self.rows

        def new() -> Head:
            return make_head(recipe.head, backbone, recipe.labels, recipe.seed)

        if recipe.head.name == "linear":
            settings = (recipe.labels, recipe.probe, recipe.seed)
            weight, bias, self.chosen[scale], crossed = probe(read[0], rows.targets, rows.patients, *settings)
            head = head_from_arrays(weight, bias, new().column)
            if head.column is not None:  # the derived label's scores out of training are those of the others
                others = np.delete(crossed, head.column, axis=1)
                crossed[:, head.column] = noisy_or(torch.from_numpy(others)).numpy()
            return head, expit(crossed)
        head = train_head(new(), read, rows.targets, recipe, recipe.seed)
        if self.held_out is not None and len(self.scales) == 1:
            return head, None
        crossed = np.full(rows.truth.shape, np.nan)
        for left_out in self._folds():
            part = train_head(new(), [r[~left_out] for r in read], rows.targets[~left_out], recipe, recipe.seed)
            crossed[left_out] = probabilities(part, [r[left_out] for r in read])
        return head, crossed

    # -- the stack --------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> dict[str, Any]:
        """What predictor.json says of the rows and labels that were used."""
        used = f"{self.rows.selection.table['patient_id'].nunique()} patients"
        used += ", labels dealt out anew" if self.recipe.permute_labels else ""
        if self.held_out is not None:
            stack = " and weights of the stack" if len(self.scales) > 1 and not self.frozen else ""
            used += f" and validation for thresholds{stack}"
        trained = 0 if self.frozen else len(self.rows.selection)
        return {"labels_used": used, "finetune_saw": "labelled images", "trained_images": trained}

    def seen(self) -> list[pd.DataFrame]:
        """What the manifest says of the rows that this run read."""
        rows = [seen_rows(self.rows.selection, "finetune classify")]
        return rows + ([seen_rows(self.held_out.selection, "thresholds")] if self.held_out is not None else [])

    def predictors(self, run: Run) -> Iterator[tuple[str, list[Member], dict[str, Any]]]:
        """(folder, members, facts) of the predictor."""
        recipe, labels = self.recipe, self.recipe.labels
        extra: dict[str, Any] = {"score": "probability"}
        if self.chosen:
            one = self.chosen[self.scales[0]]
            extra["probe"] = one if len(self.scales) == 1 else {str(s): found for s, found in self.chosen.items()}
        weights = np.ones((len(labels), 1))
        if len(self.scales) > 1:
            weights, facts = self._stack()
            extra |= facts
        extra["stack"] = {label: [float(w) for w in row] for label, row in zip(labels, weights)}
        if self.held_out is not None:
            rows, parts, source = self.held_out, self.held, "validation patients"
        else:
            rows, parts, source = self.rows, self.crossed, "cross-fitted training scores"
        if not _any(parts):
            parts, source = self._nothing(rows), "nothing, because no row is left that was not fitted"
        scores = stacked([parts[scale] for scale in self.scales], weights)
        extra |= decisions(rows.truth, scores, labels, recipe.threshold_rule, recipe.temperature, source)
        yield "predictor", [self.members[scale] for scale in self.scales], extra

    def _stack(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Weights (L, M), and what predictor.json says of them."""
        labels = self.recipe.labels
        rows, parts, source = self.rows, self.crossed, "cross-fitted training scores"
        if not self.frozen:
            source = f"{self.recipe.probe.folds} patient folds of training"
        if not _any(parts) and self.held_out is not None:
            rows, parts, source = self.held_out, self.held, "validation patients"
        if not _any(parts):
            parts, source = self._nothing(rows), "nothing, because patients are fewer than folds"
        found = stack_weights(rows.truth, [parts[scale] for scale in self.scales], rows.patients, labels)
        return found.weights, {
            "stack_from": source,
            "stack_notes": found.notes,
            "stack_auroc": ranked(rows.truth, {scale: parts[scale] for scale in self.scales}, labels),
        }

    def _nothing(self, rows: Rows) -> dict[int, np.ndarray]:
        return dict.fromkeys(self.scales, np.full(rows.truth.shape, np.nan))


def _any(parts: dict[int, np.ndarray]) -> bool:
    return any(np.isfinite(part).any() for part in parts.values())


@torch.no_grad()
def probabilities(head: Head, read: list[np.ndarray], batch_size: int = 1024) -> np.ndarray:
    """(N, L) float64 of what a head read."""
    head = head.eval()
    logits = [
        head([torch.from_numpy(part[start : start + batch_size]) for part in read]).double()
        for start in range(0, len(read[0]), batch_size)
    ]
    return torch.sigmoid(torch.cat(logits)).numpy()
