"""One-class anomaly detection as a piece of work: the backbone, its scorer, and honest thresholds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL, to_targets
from carina.data.manifest import seen_rows
from carina.data.splits import linked_patients
from carina.data.store import Selection
from carina.draws import permutation
from carina.files import write_json
from carina.finetune import anomaly
from carina.finetune.recipe import FinetuneRecipe, few
from carina.metrics.ranking import auroc
from carina.models.backbones import Backbone
from carina.models.pasting import NEEDS_MASKS
from carina.models.predictor import SPAN_IMAGES, Member, map_span
from carina.models.scorers import SCORERS, Read, ScorerSettings
from carina.progress import Progress
from carina.runs import Run
from carina.training.engine import Engine, pick_device
from carina.training.forecast import forecast


class Detector:
    """held_out: normals that nothing is fitted on, for the threshold (None: cross-fitted ones). judged: the rows on which
    checkpoints are compared (None: the last one is kept)."""

    def __init__(
        self,
        recipe: FinetuneRecipe,
        train: Selection,
        held_out: Selection | None,
        judged: Selection | None,
        backbone: Backbone,
        scale: int,
        quiet: bool,
    ):
        self.recipe, self.selection, self.held_out, self.judged = recipe, train, held_out, judged
        self.backbone, self.scale, self.quiet = backbone, scale, quiet
        self.trained = train
        if judged is not None and recipe.select == "aucp":
            self.kept = anomaly.kept_from_training(linked_patients(train.table).tolist(), recipe.seed)
            self.trained = train.where(~self.kept)
        self.device = pick_device()
        self.engine = self._engine() if recipe.mode == "full" else None
        self.main = (int(os.environ.get("RANK", 0)) if self.engine is None else self.engine.rank) == 0

    def _engine(self) -> Engine:
        recipe = self.recipe
        masks = recipe.pasting.method in NEEDS_MASKS or recipe.region != "whole"
        if masks:
            self.trained.check_lungs()
        return Engine(
            anomaly.Pasting(self.backbone, recipe),
            self.trained,
            few(recipe, len(self.trained)),
            scales=[self.scale],
            masks=masks,
            name="finetune anomaly",
            quiet=self.quiet,
        )

    def dry_run(self) -> dict[str, Any]:
        if self.engine is None:
            return {"mode": "frozen", "images": len(self.selection), "note": "frozen features take one forward pass"}
        return forecast(self.engine)

    def barrier(self) -> None:
        """Wait until the main process has made the run's folder."""
        if self.engine is not None:
            self.engine.accelerator.wait_for_everyone()

    def fit(self, run: Run, resume: bool) -> dict[str, Any]:
        """Train what the recipe trains, on every rank; facts of the training."""
        if self.engine is None:
            if self.main:  # a frozen backbone needs one process; others started by a launcher have nothing to do
                run.log(
                    f"finetune anomaly: frozen {self.backbone.spec.name} ({self.backbone.spec.origin}), "
                    f"{len(self.selection)} images, scale {self.scale}"
                )
            return {"steps": 0, "images_seen": 0, "hours": 0.0, "world_size": 1}
        facts = self.engine.fit(run, resume=resume)
        self.backbone = self.engine.task.backbone
        return facts

    @property
    def facts(self) -> dict[str, Any]:
        """What predictor.json says of the rows and labels that were used."""
        used = "the normal flag" + (" and validation normals" if self.held_out is not None else "")
        if self.recipe.select == "validation":
            used = "the normal flag and validation labels, which chose the checkpoint"
        trained = len(self.trained) if self.engine is not None else 0
        return {"labels_used": used, "finetune_saw": anomaly.saw(self.recipe), "trained_images": trained}

    def seen(self) -> list[pd.DataFrame]:
        """What the manifest says of the rows that this run read."""
        rows = [seen_rows(self.selection, "finetune anomaly")]
        if self.held_out is not None:
            rows.append(seen_rows(self.held_out, "thresholds"))
        return rows + ([seen_rows(self.judged, "choosing the checkpoint")] if self.judged is not None else [])

    def predictors(self, run: Run) -> Iterator[tuple[str, list[Member], dict[str, Any]]]:
        """(folder, members, facts) of what is saved: the predictor, and before it `predictor-last` where another
        checkpoint than the last was chosen."""
        self.backbone.eval()
        member, extra = self._detector()
        if self.judged is None:
            yield "predictor", [member], extra
            return
        yield "predictor-last", [member], extra
        last = extra["thresholds"][ABNORMAL]
        choice = self._choose(run)
        run.log(
            f"The checkpoint after {choice['step']} steps is kept by {self.recipe.select} "
            + ("" if choice["informative"] else "(not informative: the checkpoints span less than 0.05) ")
            + f"and the last one lies beside it in predictor-last (threshold {last:.4g})"
        )
        member, extra = self._detector()
        yield "predictor", [member], {**extra, "choice": choice}

    def _read(self, selection: Selection, settings: ScorerSettings, quiet: bool = True) -> Read:
        return anomaly.collect(self.backbone, selection, self.scale, settings, self.recipe.region, self.device, quiet)

    def _member(self) -> tuple[Member, Read | None]:
        """The backbone as it is now with its scorer, and what that was fitted on (None: the head of pasting)."""
        settings, normals = self.recipe.scorer, None
        if settings.name == "head":
            scorer = SCORERS["head"].of(self.engine.task.task.head, settings)
        else:
            normals = self._read(self.selection, settings, self.quiet)
            scorer = anomaly.fit_scorer(normals, settings)
        return Member(self.backbone, self.scale, None, scorer, self.recipe.region), normals

    def _detector(self) -> tuple[Member, dict[str, Any]]:
        recipe, settings = self.recipe, self.recipe.scorer
        extra: dict[str, Any] = {"score": "distance", "contamination": recipe.contamination}
        member, normals = self._member()
        if self.held_out is not None:
            scores, source = anomaly.member_distances(member, self.held_out, self.device), "validation normals"
        else:
            patients = linked_patients(self.selection.table).tolist()
            scores = anomaly.cross_fitted_distances(normals, patients, settings, recipe.seed, recipe.cross_folds)
            source = "cross-fitted training normals"
        threshold = float(np.quantile(scores, 1 - recipe.false_positive_rate))
        if member.scorer.positions:  # between which values maps are drawn
            normal = self.held_out or self.selection
            some = normal.where(permutation(len(normal), "map span")[:SPAN_IMAGES])
            extra["map_span"] = map_span(anomaly.member_maps(member, some, self.device))
        return member, {
            **extra,
            "thresholds": {ABNORMAL: threshold},
            "thresholds_from": f"{source} ({recipe.false_positive_rate:.0%} false positives)",
        }

    def _choose(self, run: Run) -> dict[str, Any]:
        """Leave the task at the checkpoint that `select` prefers; returns the choice."""
        recipe, judged = self.recipe, self.judged
        key = "aucp" if recipe.select == "aucp" else "auroc"
        table, steps = [], anomaly.checkpoint_steps(run)
        # the head has seen the training normals and cannot be fitted without some of them
        settings = (
            recipe.scorer.model_copy(update={"name": "gaussian"}) if recipe.scorer.name == "head" else recipe.scorer
        )
        for word in anomaly.pool_words(len(judged), recipe.pool_prevalence) if key == "aucp" else []:
            run.log(word)
        targets = to_targets(judged.targets([ABNORMAL]))[:, 0]
        with Progress(f"select {recipe.select}", len(steps), unit="checkpoints", quiet=self.quiet) as progress:
            for step, folder in steps:
                anomaly.load_checkpoint(self.engine.task, folder)
                if key == "aucp":
                    normals, pool = self._read(self.selection, settings), self._read(judged, settings)
                    parts = (anomaly.rows_of(normals, rows) for rows in (~self.kept, self.kept))
                    value = anomaly.aucp(*parts, pool, settings)
                else:
                    value = auroc(targets, anomaly.member_distances(self._member()[0], judged, self.device))
                table.append({"step": step, key: value})
                progress.advance(note=f"step {step} {value:.3f}")
        choice = anomaly.facts_of_choice(table, key)
        anomaly.load_checkpoint(self.engine.task, dict(steps)[choice["step"]])
        choice |= {"by": recipe.select, "images": len(judged), "prevalence": recipe.pool_prevalence}
        write_json(run.folder / "selection.json", {**choice, "checkpoints": table})
        return choice
