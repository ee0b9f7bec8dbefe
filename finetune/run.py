"""The verb finetune: backbone + store -> predictor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from carina.data.batches import in_order, intensity
from carina.data.labels import ABNORMAL, to_targets
from carina.data.manifest import seen_rows, write_manifest
from carina.data.splits import linked_patients, patient_subset, stable_folds
from carina.data.store import Selection, select
from carina.draws import permutation
from carina.errors import CarinaError
from carina.files import write_json
from carina.finetune import anomaly
from carina.finetune.classify import Classification, probe
from carina.finetune.recipe import FinetuneRecipe
from carina.metrics.ranking import auroc, youden
from carina.models.backbones import EXTERNAL, Backbone, backbone_record, load_backbone, pretext_saw
from carina.models.hub import predictor_card
from carina.models.pasting import NEEDS_MASKS
from carina.models.predictor import Member, Predictor, map_span, save_predictor
from carina.models.scorers import SCORERS, Read, ScorerSettings
from carina.progress import Progress
from carina.recipes import build
from carina.runs import Run
from carina.training.engine import Engine, pick_device, resolved
from carina.training.forecast import forecast

SPAN_IMAGES = 64


def recipe_model(name: str) -> type[FinetuneRecipe]:
    return FinetuneRecipe


def finetune(
    name: str, overrides: Any = (), *, resume: bool = False, dry_run: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe `name` (classify, anomaly or a YAML file) with overrides; returns facts of the run."""
    recipe = build("finetune", FinetuneRecipe, name, overrides)
    _check(recipe, dry_run)
    recipe = resolved(recipe, recipe.out, resume)
    torch.set_num_threads(recipe.threads)
    everything = select(recipe.store, where=recipe.where)
    train, held_out = training_rows(recipe, everything)
    scale, size = scale_and_size(recipe, everything)
    for store in everything.stores:
        store.check_scale(scale)
    mean, std = intensity(train, scale)
    reference = f"random:{recipe.architecture}" if recipe.backbone == "random" else recipe.backbone
    backbone = load_backbone(
        reference, size=size, architecture=recipe.architecture, seed=recipe.seed, mean=mean, std=std
    )
    work = _Work(recipe, train, held_out, _judged(recipe, everything, train), backbone, scale, quiet)
    if dry_run:
        return work.dry_run()
    run = work.start(resume)
    facts = work.train(run, resume)
    if not work.main:
        return facts
    info = work.predictor(run, facts)
    run.log(f"The predictor is in {run.folder / 'predictor'}")
    return {
        "run": str(run.folder),
        "predictor": str(run.folder / "predictor"),
        **facts,
        "thresholds": info["thresholds"],
    }


def _check(recipe: FinetuneRecipe, dry_run: bool) -> None:
    if not recipe.store:
        raise CarinaError("finetune needs a store; give store=FOLDER")
    if not recipe.out and not dry_run:
        raise CarinaError("finetune needs a place for the run; give out=FOLDER")
    if not recipe.labels:
        raise CarinaError("finetune classify needs the findings to learn; give labels=[NAME,...]")
    if recipe.task == "anomaly":
        anomaly.check(recipe)
    if recipe.folds is not None and recipe.fold >= recipe.folds:
        raise CarinaError(f"fold={recipe.fold} is not one of the {recipe.folds} folds; give 0 to {recipe.folds - 1}")


def training_rows(recipe: FinetuneRecipe, everything: Selection) -> tuple[Selection, Selection | None]:
    """Training rows, and the rows apart from them that set thresholds (None: cross-fitted scores do)."""
    if recipe.folds is not None:
        folds = stable_folds(linked_patients(everything.table).tolist(), recipe.folds, recipe.draw)
        train, held_out = everything.where(folds != recipe.fold), None
    else:
        train = everything.split(*recipe.rows.split("+"))
        held_out = everything.split(*recipe.threshold_rows.split("+")) if recipe.threshold_rows else None
        if not len(train):
            have = ", ".join(sorted(set(everything.table["split"])))
            raise CarinaError(f"no row has split={recipe.rows} (the store has {have}); give rows= to match")
    targets = to_targets(train.targets(recipe.labels), recipe.uncertain)
    if recipe.task == "anomaly":
        normal = targets[:, 0] == 0
        if not normal.any():
            raise CarinaError(
                "no training row is known to be normal (abnormal = 0); anomaly detection learns from normals"
            )
        train = train.where(anomaly.contaminated(train, normal, targets[:, 0] == 1, recipe.contamination, recipe.seed))
        if held_out is not None:
            held_out = held_out.where(held_out.targets(recipe.labels)[:, 0] == 0)
    else:
        train = train.where(~np.isnan(targets).all(axis=1))
        if recipe.patients is not None:
            keep = patient_subset(train.table["patient_id"].tolist(), recipe.patients, recipe.draw)
            train = train.where(keep)
            # validation patients are labels too: with a count of labelled patients only these are used
            held_out = None
        if not len(train):
            raise CarinaError(f"no training row has a known value of {', '.join(recipe.labels)}; check labels=")
    if held_out is not None and (shared := shared_patients(everything, train, held_out)):
        raise CarinaError(
            f"{shared} patients of threshold_rows={recipe.threshold_rows} are trained on, so thresholds would come from "
            "what was fitted; give threshold_rows=null, which cross-fits, or rows of other patients"
        )
    held_out = held_out if held_out is not None and len(held_out) else None
    if recipe.task == "anomaly" and recipe.scorer.name == "head" and held_out is None:
        raise CarinaError(
            "scorer.name=head is trained on the training normals, so its threshold needs other ones; give "
            "threshold_rows=SPLIT with normal images"
        )
    return train, held_out


def shared_patients(everything: Selection, a: Selection, b: Selection) -> int:
    """How many patients, copies under other names linked, two parts of a selection share."""
    linked = dict(zip(everything.table["image_id"], linked_patients(everything.table)))
    patients = [{linked[image] for image in part.table["image_id"]} for part in (a, b)]
    return len(patients[0] & patients[1])


def _judged(recipe: FinetuneRecipe, everything: Selection, train: Selection) -> Selection | None:
    """The rows on which checkpoints are compared; None where the last one is kept."""
    if recipe.task != "anomaly" or recipe.select == "last":
        return None
    name = recipe.pool_rows if recipe.select == "aucp" else recipe.threshold_rows
    rows = everything.split(*name.split("+"))
    if not len(rows):
        raise CarinaError(
            f"no row has split={name}, which select={recipe.select} compares checkpoints on; name another"
        )
    if shared := shared_patients(everything, train, rows):
        raise CarinaError(
            f"{shared} patients of split={name} are trained on, so select={recipe.select} would judge what it has "
            "seen; name rows of other patients"
        )
    if recipe.select == "validation" and set(to_targets(rows.targets([ABNORMAL]))[:, 0]) < {0.0, 1.0}:
        raise CarinaError(
            f"select=validation needs normal and abnormal images, and split={name} has not both; name others"
        )
    return rows


def scale_and_size(recipe: FinetuneRecipe, selection: Selection) -> tuple[int, int | None]:
    """The scale that is read, and the size that enters the network (None: the backbone's own)."""
    scales = sorted(set.intersection(*(set(store.scales) for store in selection.stores)))
    if not scales:
        raise CarinaError("the stores share no scale; prepare one of them again")
    if recipe.scale is not None:
        return recipe.scale, recipe.size or (recipe.scale if recipe.backbone.startswith("random") else None)
    if recipe.backbone.startswith("random"):
        scale = recipe.size if recipe.size in scales else scales[-1]
        return scale, recipe.size or scale
    own = recipe.size or load_backbone(recipe.backbone, architecture=recipe.architecture).spec.size
    return next((scale for scale in scales if scale >= own), scales[-1]), recipe.size


class _Work:
    """One fine-tuning run, step by step."""

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
            self.kept = anomaly.kept_from_training(train.table["patient_id"].tolist(), recipe.seed)
            self.trained = train.where(~self.kept)
        self.device = pick_device()
        self.engine = self._engine() if recipe.mode == "full" else None
        rank = int(os.environ.get("RANK", 0)) if self.engine is None else self.engine.rank
        self.main = rank == 0

    def _engine(self) -> Engine:
        recipe = self.recipe
        settings = recipe
        if recipe.batch_size > len(self.trained):
            # few labels: the largest even batch that the rows fill
            settings = recipe.model_copy(update={"batch_size": max(2, len(self.trained) // 2 * 2)})
        classify = recipe.task == "classify"
        masks = not classify and (recipe.pasting.method in NEEDS_MASKS or recipe.region != "whole")
        if masks:
            self.trained.check_lungs()
        task = Classification(self.backbone, recipe) if classify else anomaly.Pasting(self.backbone, recipe)
        targets = to_targets(self.trained.targets(recipe.labels), recipe.uncertain) if classify else None
        return Engine(
            task,
            self.trained,
            settings,
            scales=[self.scale],
            masks=masks,
            targets=targets,
            name=f"finetune {recipe.task}",
            quiet=self.quiet,
        )

    def dry_run(self) -> dict[str, Any]:
        if self.engine is None:
            return {"mode": "frozen", "images": len(self.selection), "note": "frozen features take one forward pass"}
        return forecast(self.engine)

    def start(self, resume: bool) -> Run:
        if not self.main:
            if self.engine is not None:
                self.engine.accelerator.wait_for_everyone()
            return Run(self.recipe.out, quiet=True)
        run = Run.start(self.recipe.out, "finetune", self.recipe, resume=resume, quiet=self.quiet)
        if self.engine is not None:
            self.engine.accelerator.wait_for_everyone()
        return run

    def train(self, run: Run, resume: bool) -> dict[str, Any]:
        if self.engine is None:
            facts = {"steps": 0, "images_seen": 0, "hours": 0.0, "world_size": 1}
            if not self.main:  # a frozen backbone needs one process; others started by a launcher have nothing to do
                return facts
            run.log(
                f"finetune {self.recipe.task}: frozen {self.backbone.spec.name} ({self.backbone.spec.origin}), "
                f"{len(self.selection)} images, scale {self.scale}"
            )
            return facts
        facts = self.engine.fit(run, resume=resume)
        self.backbone = self.engine.task.backbone
        return facts

    @torch.no_grad()
    def features(self, selection: Selection) -> np.ndarray:
        """(N, D) float32, in full precision and evaluation mode."""
        network = self.backbone.to(self.device).eval()
        parts = [network.features(images).float().cpu() for _, images in in_order(selection, self.scale, self.device)]
        return torch.cat(parts).numpy()

    def predictor(self, run: Run, facts: dict[str, Any]) -> dict[str, Any]:
        recipe = self.recipe
        self.backbone.eval()
        rows = [seen_rows(self.selection, f"finetune {recipe.task}")]
        if self.held_out is not None:
            rows.append(seen_rows(self.held_out, "thresholds"))
        if recipe.task == "classify":
            info = self._save(run, run.folder / "predictor", facts, *self._classifier())
        elif recipe.select == "last":
            info = self._save(run, run.folder / "predictor", facts, *self._detector())
        else:
            last = self._save(run, run.folder / "predictor-last", facts, *self._detector())
            choice, judged = self._choose(run)
            rows.append(seen_rows(judged, "choosing the checkpoint"))
            member, extra = self._detector()
            info = self._save(run, run.folder / "predictor", facts, member, {**extra, "choice": choice})
            run.log(
                f"The checkpoint after {choice['step']} steps is kept by {recipe.select} "
                + ("" if choice["informative"] else "(not informative: the checkpoints span less than 0.05) ")
                + f"and the last one lies beside it in predictor-last (threshold {last['thresholds'][ABNORMAL]:.4g})"
            )
        write_manifest(
            run.folder, pd.concat(rows), began_with=recipe.backbone, natural_images=recipe.backbone in EXTERNAL
        )
        return info

    def _save(self, run: Run, folder: Path, facts: dict[str, Any], member: Member, extra: dict[str, Any]) -> dict:
        recipe, member = self.recipe, member.cpu().eval()
        table = self.selection.table
        saw = anomaly.saw(recipe) if recipe.task == "anomaly" else "labelled images"
        info = {
            "kind": recipe.task,
            "mode": recipe.mode,
            "labels": recipe.labels,
            "stack": {label: [1.0] for label in recipe.labels},
            "photometry": self.selection.photometry,
            "geometry": self.selection.geometry,
            "synthetic": self.selection.synthetic,
            "labels_used": self._labels_used(),
            "pretext_saw": pretext_saw(recipe.backbone),
            "transductive": bool(backbone_record(recipe.backbone).get("transductive", False)),
            "finetune_saw": saw,
            "trained_images": len(self.trained) if recipe.mode == "full" else 0,
            "data": {"images": len(table), "patients": int(table["patient_id"].nunique())},
            "store_hashes": self.selection.hashes,
            "labels_hashes": self.selection.labels_hashes,
            "seed": recipe.seed,
            "draw": recipe.draw,
            "folds": recipe.folds,
            "fold": recipe.fold if recipe.folds is not None else None,
            "where": recipe.where,
            "rows": recipe.rows,
            "training": facts,
            **extra,
        }
        predictor = Predictor(info, [member])
        members = [{"backbone": member.backbone.spec.to_dict(), "scale": self.scale}]
        save_predictor(folder, predictor, predictor_card({**info, "members": members}, [], None))
        return info

    def _labels_used(self) -> str:
        if self.recipe.task == "anomaly":
            if self.recipe.select == "validation":
                return "the normal flag and validation labels, which chose the checkpoint"
            return "the normal flag" + (" and validation normals" if self.held_out is not None else "")
        patients = self.selection.table["patient_id"].nunique()
        return f"{patients} patients" + (" and validation for thresholds" if self.held_out is not None else "")

    def _classifier(self) -> tuple[Member, dict[str, Any]]:
        recipe = self.recipe
        extra: dict[str, Any] = {"score": "probability"}
        crossed = None
        if recipe.mode == "frozen":
            targets = to_targets(self.selection.targets(recipe.labels), recipe.uncertain)
            head, chosen, crossed = probe(
                self.features(self.selection),
                targets,
                self.selection.table["patient_id"].tolist(),
                recipe.labels,
                recipe.probe,
                recipe.seed,
            )
            extra["probe"] = chosen
        else:
            head = self.engine.task.head.float()
        member = Member(self.backbone.to("cpu"), self.scale, head.to("cpu"), None).eval()
        if self.held_out is not None:
            rows, source = self.held_out, "validation patients (Youden)"
            with torch.no_grad():
                scores = member.from_features(torch.from_numpy(self.features(rows)).cpu()).double().numpy()
        else:
            rows, scores, source = self.selection, crossed, "cross-fitted training scores (Youden)"
        extra["thresholds"], extra["thresholds_from"] = {}, source
        for column, label in enumerate(recipe.labels):
            if scores is None:
                continue
            target = to_targets(rows.targets([label]))[:, 0]
            use = ~np.isnan(target) & ~np.isnan(scores[:, column])
            if len(np.unique(target[use])) == 2:
                extra["thresholds"][label] = float(youden(target[use], scores[use, column]))
        for label in recipe.labels:
            if label not in extra["thresholds"]:
                extra["thresholds"][label] = 0.5
                extra["thresholds_from"] = f"{source}; 0.5 where those hold one class only or nothing was cross-fitted"
        return member, extra

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
            patients = self.selection.table["patient_id"].tolist()
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

    def _choose(self, run: Run) -> tuple[dict[str, Any], Selection]:
        """Leave the task at the checkpoint that `select` prefers; returns the choice and the rows that it was made on."""
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
        return choice, judged
